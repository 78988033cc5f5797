"""The demo's summary: what ran, how long each phase took, what it made, and where to look next."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from valohai_dagster.cli.render import (
    in_columns,
    metrics_text,
    seconds_text,
    size_text,
    status_text,
    total_seconds,
)
from valohai_dagster.data.printable import printable
from valohai_dagster.executions.client import ExecutionClient
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.executions.timing import PHASES, phase_seconds
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import open_stores


def summary_of(
    client: ExecutionClient, executions: Iterable[str], *, seconds: float
) -> dict[str, Any]:
    """Everything as plain JSON values; `ok` when there was something and all of it is complete."""
    views = [view for one in executions if (view := client.view(one)) is not None]
    locations = _locations(client, [view.id for view in views])
    return {
        "ok": bool(views) and all(v.status is ExecutionStatus.complete for v in views),
        "seconds": round(seconds, 1),
        "run_id": _run_id(client, views),
        "executions": [_execution(view, locations) for view in views],
    }


def _execution(view: ExecutionView, locations: dict[str, str]) -> dict[str, Any]:
    return {
        "id": view.id,
        "project": view.project,
        "step": view.step,
        "counter": view.counter,
        "status": view.status.value,
        "reason": view.reason,
        "commit": view.commit,
        "worker": view.worker,
        "runtime": view.runtime,
        "seconds": total_seconds(view),
        "phases": phase_seconds(view),
        "metrics": {k: v for k, v in view.latest_metadata.items() if k != "_time"},
        "outputs": [
            {
                "name": output.name,
                "size": output.size,
                "uri": output.uri,
                "url": output.url,
                "location": locations.get(output.id),
            }
            for output in view.outputs
        ],
    }


def _locations(client: ExecutionClient, executions: list[str]) -> dict[str, str]:
    """Where the stores keep the outputs, by datum id: a path for a local store, else the store's URI."""
    stores, sections = open_stores(client.settings), client.settings.stores
    d = t.datums.c
    query = sa.select(d.id, d.store, d.key).where(d.execution_id.in_(executions))

    def place(store: str, key: str) -> str:
        section = sections.get(store)
        if section is not None and section.kind == "local":
            return str(section.path / key)
        return stores.get(store).uri(key)

    with client.records.read() as conn:
        return {row.id: place(row.store, row.key) for row in conn.execute(query)}


def _run_id(client: ExecutionClient, views: list[ExecutionView]) -> str | None:
    if not views:
        return None
    query = sa.select(t.executions.c.run_id).where(t.executions.c.id == views[0].id)
    with client.records.read() as conn:
        return conn.execute(query).scalar()


def print_summary(console: Console, summary: dict[str, Any], settings: Settings) -> None:
    executions = summary["executions"]
    console.print()
    console.print(_phase_table(executions))
    console.print()
    console.print("[bold]Outputs[/bold]")
    console.print("\n".join(_output_lines(executions)), markup=False, soft_wrap=True)
    console.print("\n[bold]Last metrics[/bold]")
    for one in executions:
        if one["metrics"]:
            values = escape(metrics_text(one["metrics"]))
            console.print(f"{one['step']}  {values}", soft_wrap=True)
        if one["reason"] and one["status"] != "complete":
            console.print(f"[red]{one['step']}  {escape(one['reason'])}[/red]", soft_wrap=True)
    for location in _models(executions):
        console.print(f"\n[bold]Model file[/bold]\n{location}", soft_wrap=True)
    verdict = "[green]All green[/green]" if summary["ok"] else "[red]Not complete[/red]"
    console.print(f"\n{verdict} in {seconds_text(summary['seconds'])}. Where to look next:")
    for line in in_columns(_next_steps(summary, settings)):
        console.print(f"  {line}", soft_wrap=True)


_HEADS = {"preparing": "prep", "downloading": "download", "uploading": "upload"}


def _phase_table(executions: list[dict[str, Any]]) -> Table:
    table = _table("Executions, seconds by phase")
    table.add_column("step", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for phase in (*PHASES, "total"):
        table.add_column(_HEADS.get(phase, phase), justify="right", no_wrap=True)
    for one in executions:
        seconds = [*(one["phases"].get(phase) for phase in PHASES), one["seconds"]]
        status = status_text(ExecutionStatus(one["status"]))
        spent = ["-" if value is None else f"{value:.1f}" for value in seconds]
        table.add_row(one["step"], status, *spent)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)


def _output_lines(executions: list[dict[str, Any]]) -> list[str]:
    rows = [
        [f"{one['step']}/{printable(o['name'])}", size_text(o["size"]), o["url"] or o["uri"]]
        for one in executions
        for o in one["outputs"]
    ]
    return in_columns(rows, right=frozenset({1}))


def _next_steps(summary: dict[str, Any], settings: Settings) -> list[list[str]]:
    here = Path(".venv/bin/valohai-dagster")
    command = str(here) if here.exists() else "valohai-dagster"
    run = (summary["run_id"] or "latest")[:8]
    return [
        ["make up", f"the UI on {settings.webserver_address}: lineage, metrics, logs, pictures"],
        [f"{command} outputs {run} --download", "the files"],
        [f"{command} metrics {run}", "the metrics of each epoch"],
        [f"{command} doctor", "what runs here, and whether it is well"],
    ]


def _models(executions: list[dict[str, Any]]) -> list[str]:
    """Where the stores keep the model files."""
    return [
        escape(str(output["location"]))
        for one in executions
        for output in one["outputs"]
        if output["location"] and output["name"].endswith(".joblib")
    ]
