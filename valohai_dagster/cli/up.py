"""`valohai-dagster up`: the UI with everything behind it, in one terminal."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import typer

from valohai_dagster.cli.checkout import checkout_root, dagster_home
from valohai_dagster.embedded.conductor import apply_settings, ensure_conductor, keep_alive
from valohai_dagster.settings import load_settings


def up(
    host: str = typer.Option("127.0.0.1", "--host", "-h", help="Address of the UI."),
    port: int = typer.Option(3000, "--port", "-p", help="Port of the UI."),
) -> None:
    """Start the UI, the daemon and the conductor; Ctrl-C ends the UI and the daemon.

    Executions that run at that moment go on, and the conductor ends once it is idle.
    """
    settings = load_settings()
    _check_free(host, port)
    root = checkout_root(settings)
    environment = {**os.environ, "DAGSTER_HOME": str(dagster_home(root, settings))}
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(root / "workspace.yaml")]
    keep_alive(settings)
    apply_settings(settings)
    ensure_conductor(settings)
    url = _address(host, port)
    settings.webserver_file.write_text(f"{url}\n")
    typer.echo(f"The UI comes up on {url}; Ctrl-C ends it.", err=True)
    raise typer.Exit(_run([*command, "-h", host, "-p", str(port)], root, environment))


def _check_free(host: str, port: int) -> None:
    """Raises a usage error before anything is started; Dagster itself notices after half a minute."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            text = f"{host}:{port} cannot be used ({error.strerror}); choose another with --port (make up PORT=...)"
            raise typer.BadParameter(text, param_hint="--port") from error


def _address(host: str, port: int) -> str:
    """For browsers on this machine."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _run(command: list[str], root: Path, environment: dict[str, str]) -> int:
    """Runs it in the foreground and passes SIGTERM on; returns its exit code.

    A script's background jobs start with SIGINT ignored, and whoever they start inherits that: then nothing could
    end Dagster's processes. A handler of our own is not inherited, so they begin with the usual behaviour.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=root, env=environment)
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            continue
        return 0 if code < 0 else code
