"""SSH into a running execution with the real client (K-60 to K-62), in containers and in plain processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import demand
from tests.support.agent_conductor import Conductor
from tests.support.agent_process import AgentProcess
from tests.support.ports import free_port, wait_for
from tests.support.redis_server import RedisServer
from valohai_agent.protocol import Outcome, RemoteDebug, Warned

SECONDS = 60
WAITS = "echo ready; while ! test -e /valohai/outputs/end; do sleep 0.1; done"


@dataclass
class Rig:
    """An agent, and a client with its key."""

    conductor: Conductor
    directory: Path
    image: str

    def key(self, name: str = "key") -> Path:
        path = self.directory / name
        if not path.exists():
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "me@here", "-f", path]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        return path

    def submit(
        self, *commands: str, port: int, key: str | None = None, says: str = "::ssh::"
    ) -> str:
        public = key or self.key().with_suffix(".pub").read_text().strip()
        execution_id = self.conductor.submit(
            *commands, image=self.image, remote_debug=RemoteDebug(port=port, key=public)
        )
        self.says(execution_id, "stdout", "ready")
        self.says(execution_id, "status", says)
        return execution_id

    def says(self, execution_id: str, stream: str, start: str) -> str:
        def found() -> str | None:
            lines = self.conductor.live_lines(execution_id)
            return next((m for s, m in lines if s == stream and m.startswith(start)), None)

        return wait_for(found, seconds=SECONDS, what=f"{start!r} from {execution_id}") or ""

    def argv(self, port: int, *words: str, key: str = "key", user: str = "root") -> list[str]:
        options = (
            "StrictHostKeyChecking=no UserKnownHostsFile=/dev/null LogLevel=ERROR BatchMode=yes"
        )
        flags = [flag for option in options.split() for flag in ("-o", option)]
        identity = ["-F", "none", "-o", "IdentitiesOnly=yes", "-i", str(self.key(key))]
        return [
            "ssh",
            *flags,
            *identity,
            "-p",
            str(port),
            *words[:-1],
            f"{user}@127.0.0.1",
            *words[-1:],
        ]

    def ssh(
        self, port: int, *words: str, data: bytes = b"", **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        argv = self.argv(port, *words, **options)
        return subprocess.run(argv, input=data, capture_output=True, timeout=SECONDS, check=False)

    def end(self, execution_id: str, port: int) -> None:
        """Ends the command from within, and the server with it."""
        self.ssh(port, "touch /valohai/outputs/end")  # may be cut off by what it brings about
        finished = self.conductor.finished(execution_id)
        assert (finished.outcome, finished.reason) == (Outcome.complete, None)


@pytest.fixture(params=["docker", "process"])
def rig(
    request: pytest.FixtureRequest,
    conductor: Conductor,
    redis_server: RedisServer,
    short_tmp: Path,
) -> Iterator[Rig]:
    if shutil.which("ssh") is None:
        demand.missing("ssh", "there is no `ssh` on PATH (package openssh-client)")
    image = "python:3.11"
    if request.param == "docker":
        image = request.getfixturevalue("docker_image")
    else:
        request.getfixturevalue("namespaces")
    agent = AgentProcess(redis_server.unix_url, short_tmp / "work", runtime=request.param)
    yield Rig(conductor, short_tmp, image)
    agent.stop()


def test_k61_k62_commands_shells_and_streams_end_where_the_command_runs(rig: Rig) -> None:
    port = free_port()
    execution_id = rig.submit("echo mine > made-by-the-command", WAITS, port=port)
    event = rig.says(execution_id, "status", "::ssh::")
    said = json.loads(event.removeprefix("::ssh::"))
    assert said["port"] == port
    assert said["address"]
    hint = rig.says(execution_id, "status", "SSH is open")
    assert f"-p {port} root@{said['address']}" in hint

    seen = rig.ssh(
        port,
        'id -u; pwd; cat made-by-the-command hello.txt; echo "$VH_EXECUTION_ID"; ls -d /valohai/*',
    )
    assert seen.stderr == b""
    assert seen.stdout.decode().splitlines() == [
        *("0", "/valohai/repository", "mine", "hello", execution_id),
        *(f"/valohai/{name}" for name in ("config", "inputs", "outputs", "repository")),
    ]
    assert rig.ssh(port, "echo bad >&2; exit 7").returncode == 7
    assert rig.ssh(port, "echo bad >&2; exit 7").stderr == b"bad\n"

    data = os.urandom(3_000_000)
    up = rig.ssh(port, "cat > /valohai/outputs/up && cat /valohai/outputs/up", data=data)
    assert (up.returncode, up.stdout == data) == (0, True)

    shell = rig.ssh(port, "-tt", "", data=b"tty; stty -echo; echo $TERM; exit 3\n")
    assert shell.returncode == 3
    assert b"/dev/pts/" in shell.stdout
    rig.end(execution_id, port)


def test_k60_only_the_given_key_is_let_in(rig: Rig) -> None:
    port = free_port()
    execution_id = rig.submit(WAITS, port=port)
    assert b"Permission denied" in rig.ssh(port, "true", key="other").stderr
    assert b"Permission denied" in rig.ssh(port, "true", user="admin").stderr
    assert rig.ssh(port, "true").returncode == 0
    rig.end(execution_id, port)


def test_k62_a_tunnel_reaches_what_listens_beside_the_command(rig: Rig) -> None:
    port, local, inner = free_port(), free_port(), free_port()
    execution_id = rig.submit(
        f"python3 -m http.server {inner} --bind 127.0.0.1 --directory /valohai/repository &",
        WAITS,
        port=port,
    )
    argv = rig.argv(
        port, "-N", "-L", f"{local}:127.0.0.1:{inner}", "-o", "ExitOnForwardFailure=yes", ""
    )
    tunnel = subprocess.Popen(argv[:-1], stdin=subprocess.DEVNULL)
    try:

        def fetched() -> bytes | None:
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{local}/hello.txt", timeout=10
                ) as got:
                    return got.read()
            except OSError:
                return None

        assert wait_for(fetched, seconds=SECONDS, what="the page through the tunnel") == b"hello\n"
        rig.end(execution_id, port)
        assert tunnel.wait(SECONDS) != 0
    finally:
        tunnel.kill()
        tunnel.wait()


def test_k62_sessions_die_with_the_execution(rig: Rig) -> None:
    port = free_port()
    execution_id = rig.submit(WAITS, port=port)
    session = subprocess.Popen(
        rig.argv(port, "echo in; sleep 600"), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert session.stdout is not None
    with session.stdout:
        assert session.stdout.readline() == b"in\n"
        rig.end(execution_id, port)
        assert session.wait(SECONDS) != 0
    assert b"Connection refused" in rig.ssh(port, "true").stderr


def test_what_stands_in_the_way_is_a_warning_and_the_command_runs(rig: Rig) -> None:
    import socket

    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        execution_id = rig.submit("echo ready", port=port, says="Warning")
        assert rig.conductor.finished(execution_id).outcome is Outcome.complete
    bad_key = rig.submit("echo ready", port=free_port(), key="ssh-ed25519 nonsense", says="Warning")
    assert rig.conductor.finished(bad_key).outcome is Outcome.complete
    [first] = rig.conductor.applied(execution_id).bodies(Warned)
    [second] = rig.conductor.applied(bad_key).bodies(Warned)
    assert f"Remote debugging is not available: port {port}" in first.message
    assert "the public key cannot be read" in second.message
