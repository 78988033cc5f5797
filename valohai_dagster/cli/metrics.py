"""`valohai-dagster metrics RUN --follow`: the metrics that user code printed, also while it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
import typer
from rich.console import Console

from valohai_dagster.cli.lookup import REFERENCE_HELP, find_executions
from valohai_dagster.cli.render import metrics_text
from valohai_dagster.executions.stream import ExecutionStatus
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import load_settings

POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class MetricLine:
    """One JSON line that a step printed (M-10)."""

    step: str
    counter: int
    attempt: int
    time: datetime
    values: dict[str, Any]


def metrics(
    run: str = typer.Argument("latest", help=REFERENCE_HELP),
    follow: bool = typer.Option(False, "--follow", "-f", help="Go on until the executions end."),
    step: str | None = typer.Option(None, "--step", help="Only this step's metrics."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object per line."),
) -> None:
    """Print the metrics of a run or execution, line by line."""
    records = open_records(load_settings())
    console = Console(highlight=False)
    try:
        for line in metric_lines(records, run, step=step, follow=follow):
            if as_json:
                print(json.dumps(_as_dict(line)), flush=True)
            else:
                clock = line.time.astimezone().strftime("%H:%M:%S")
                console.print(f"[dim]{clock}[/dim] [bold]{line.step}[/bold] ", end="")
                console.print(metrics_text(line.values), markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def metric_lines(
    records: Records,
    reference: str,
    *,
    step: str | None = None,
    follow: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[MetricLine]:
    """Lines in order; with `follow` until every execution of the reference has ended and been read to its end."""
    seen: dict[str, int] = {}
    while True:
        with records.read() as conn:
            executions = find_executions(conn, reference, step=step)
            ended = _all_ended(conn, executions)
            lines = [line for one in executions for line in _new_lines(conn, one, seen)]
        yield from lines
        if not follow or ended:
            return
        sleep(POLL_SECONDS)


def _all_ended(conn: sa.Connection, executions: list[str]) -> bool:
    query = sa.select(t.executions.c.status).where(t.executions.c.id.in_(executions))
    return all(ExecutionStatus(status).final for status in conn.execute(query).scalars())


def _new_lines(conn: sa.Connection, execution: str, seen: dict[str, int]) -> Iterator[MetricLine]:
    m, e = t.metadata_events.c, t.executions.c
    query = (
        sa.select(t.metadata_events, e.step, e.counter)
        .join(t.executions, e.id == m.execution_id)
        .where(m.execution_id == execution, m.number > seen.get(execution, -1))
        .order_by(m.number)
    )
    for row in conn.execute(query):
        seen[execution] = row.number
        yield MetricLine(
            step=row.step,
            counter=row.counter,
            attempt=row.attempt,
            time=row.time,
            values=row._mapping["values"],
        )


def _as_dict(line: MetricLine) -> dict[str, Any]:
    values = {name: value for name, value in line.values.items() if name != "_time"}
    return {
        "step": line.step,
        "execution": line.counter,
        "attempt": line.attempt,
        "time": line.time.isoformat(),
        "values": values,
    }
