"""`valohai-dagster demo`: runs this deployment's example through Dagster's own command and shows what happened.

Nothing here is special to the demo: it starts `dagster asset materialize` as anybody would, follows the executions
that come of it, and reads the records for the summary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa
import typer
from rich.console import Console

from valohai_agent.protocol import utcnow
from valohai_dagster.cli.checkout import checkout_root, dagster_home
from valohai_dagster.cli.demo_summary import print_summary, summary_of
from valohai_dagster.cli.progress import ProgressLines
from valohai_dagster.executions.client import ExecutionClient
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings, load_settings

POLL_SECONDS = 0.3
LOG_TAIL_LINES = 30


def demo(
    select: str = typer.Option('key:"digits/*"', "--select", help="Assets to materialize."),
    as_json: bool = typer.Option(False, "--json", help="Print the summary as JSON on stdout."),
) -> None:
    """Run the example project on this machine and print a summary."""
    console = Console(stderr=as_json, highlight=False)
    settings = load_settings()
    root = checkout_root(settings)
    began, clock = utcnow(), time.monotonic()
    console.print(f"State directory: {settings.state_dir}", soft_wrap=True)
    client = ExecutionClient.open(settings)
    console.print(f"dagster asset materialize --select '{select}' -m definitions", style="bold")
    log = settings.state_dir / "demo.log"
    process = _materialize(root, settings, select, log)
    executions = _watch(process, client, console, began)
    summary = summary_of(client, executions, seconds=time.monotonic() - clock)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        print_summary(console, summary, settings)
    if process.returncode != 0 or not summary["ok"]:
        _print_tail(console, log, process.returncode)
        raise typer.Exit(1)


def _materialize(root: Path, settings: Settings, select: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dagster", "asset", "materialize"]
    environment = {**os.environ, "DAGSTER_HOME": str(dagster_home(root, settings))}
    with log.open("wb") as out:
        return subprocess.Popen(
            [*command, "--select", select, "-m", "definitions", "-d", str(root)],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def _watch(
    process: subprocess.Popen[bytes], client: ExecutionClient, console: Console, began: datetime
) -> list[str]:
    """Prints what the new run's executions do until Dagster's command ends; returns their ids in order."""
    progress = ProgressLines(client, console)
    try:
        while process.poll() is None:
            progress.add(_executions_since(client, began))
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        console.print("Interrupted: Dagster stops the execution, its outputs are kept.")
        process.wait()  # the terminal sent it the interrupt too
    executions = _executions_since(client, began)
    progress.add(executions)
    progress.finish()
    return list(executions)


def _executions_since(client: ExecutionClient, began: datetime) -> dict[str, str]:
    """Id -> step of all executions of the run that was started last since then."""
    e = t.executions.c
    query = sa.select(e.id, e.step, e.run_id).where(e.ctime >= began).order_by(e.ctime)
    with client.records.read() as conn:
        rows = list(conn.execute(query))
    run = rows[0].run_id if rows else None
    return {row.id: row.step for row in rows if row.run_id == run}


def _print_tail(console: Console, log: Path, code: int) -> None:
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    console.print(f"Dagster ended with exit code {code}; the end of {log}:", style="red")
    console.print("\n".join(lines), markup=False)
