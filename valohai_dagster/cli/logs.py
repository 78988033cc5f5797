"""`valohai-dagster logs RUN`: what executions printed, live or stored, without the UI."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
import typer

from valohai_dagster.cli.lookup import REFERENCE_HELP, find_executions, find_run
from valohai_dagster.errors import NotFoundError
from valohai_dagster.executions.stream import ExecutionStatus
from valohai_dagster.plugin.log_sections import PIECE, STREAMS, LogSection, Stream
from valohai_dagster.plugin.log_source import ServiceLogs
from valohai_dagster.records import tables as t
from valohai_dagster.settings import load_settings

POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class LogText:
    """One line that an execution, or the platform about it, has written; without the end of the line."""

    execution: str
    step: str
    counter: int
    attempt: int
    stream: Stream
    text: str

    @property
    def place(self) -> tuple[str, int, Stream]:
        return self.execution, self.attempt, self.stream


def logs(
    run: str = typer.Argument("latest", help=REFERENCE_HELP),
    follow: bool = typer.Option(False, "--follow", "-f", help="Go on until the executions end."),
    stream: Literal["stdout", "stderr", "both"] = typer.Option(
        "both", "--stream", help="stderr has the platform's own lines too."
    ),
    step: str | None = typer.Option(None, "--step", help="Only this step's log."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object per line."),
) -> None:
    """Print the log of an execution, or of all executions of a run: the stored one, or the live one while it runs.

    The two streams are kept apart, so their order is not that of the clock; headings tell which one follows. While an
    execution prints very much, its live log leaves lines out and says so; the stored one has all.
    """
    settings = load_settings()
    reader = ServiceLogs(lambda: settings)
    streams = STREAMS if stream == "both" else (stream,)
    last: tuple[str, int, Stream] | None = None
    try:
        several = len(streams) > 1 or (not follow and len(_executions(reader, run, step)) > 1)
        for line in log_lines(reader, run, streams=streams, step=step, follow=follow):
            if as_json:
                typer.echo(json.dumps(_as_dict(line), ensure_ascii=False))
            else:
                if line.place != last and (several or last is not None):
                    typer.echo(_heading(line, first=last is None))
                typer.echo(line.text)
            last = line.place
        if last is None:
            typer.echo(_nothing(run, follow), err=True)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        reader.close()


def log_lines(
    reader: ServiceLogs,
    reference: str,
    *,
    streams: Sequence[Stream] = STREAMS,
    step: str | None = None,
    follow: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[LogText]:
    """Lines by execution, attempt and stream. With `follow` until every execution of the reference, and the run that it
    means, has ended; `latest` stays the run that it was at first."""
    readings: dict[tuple[str, int, Stream], _Reading] = {}
    run = _run(reader, reference) if follow else None
    while True:
        driven = run is not None and _is_driven(reader, run)
        try:
            executions = _executions(reader, run or reference, step)
        except NotFoundError:
            if not driven:
                raise
            executions = []  # of this run, or this step of it, there is none yet
        ended = not driven and all(ExecutionStatus(row.status).final for row in executions)
        last = ended or not follow
        for row in executions:
            for section in reader.index_of_execution(row.id).sections:
                for stream in streams:
                    place = (row.id, section.attempt, stream)
                    reading = readings.setdefault(place, _Reading())
                    for text in reading.lines(reader, section, stream, last or section.ended):
                        yield LogText(
                            execution=row.id,
                            step=row.step,
                            counter=row.counter,
                            attempt=section.attempt,
                            stream=stream,
                            text=text,
                        )
        if last:
            return
        sleep(POLL_SECONDS)


class _Reading:
    """How far one stream of one attempt has been read."""

    def __init__(self) -> None:
        self._offset = 0
        self._rest = b""  # a line whose end is still to come

    def lines(
        self, reader: ServiceLogs, section: LogSection, stream: Stream, ended: bool
    ) -> Iterator[str]:
        """What is new; `ended`: a line without an end is one too."""
        data = b"-"
        while data:
            data, self._offset = reader.read(section, stream, self._offset, PIECE)
            *whole, self._rest = (self._rest + data).split(b"\n")
            yield from (line.decode("utf-8", "replace") for line in whole)
        if ended and self._rest:
            yield self._rest.decode("utf-8", "replace")
            self._rest = b""


def _executions(reader: ServiceLogs, reference: str, step: str | None) -> list[Any]:
    with reader.records().read() as conn:
        ids = find_executions(conn, reference, step=step)
        e = t.executions.c
        query = sa.select(e.id, e.step, e.counter, e.status).where(e.id.in_(ids))
        return list(conn.execute(query.order_by(e.ctime, e.counter)))


def _run(reader: ServiceLogs, reference: str) -> str | None:
    with reader.records().read() as conn:
        return find_run(conn, reference)


def _is_driven(reader: ServiceLogs, run: str) -> bool:
    """Whether a conductor still brings the run's steps to execution, so that more may come."""
    c = t.runs.c
    with reader.records().read() as conn:
        query = sa.select(c.state).where(c.run_id == run, c.ended_at.is_(None))
        return conn.execute(query).first() is not None


def _heading(line: LogText, *, first: bool) -> str:
    """As `tail` has it for several files."""
    before = "" if first else "\n"
    return f"{before}==> {line.step}: execution #{line.counter}, attempt {line.attempt}, {line.stream} <=="


def _nothing(reference: str, follow: bool) -> str:
    waiting = "" if follow else "; --follow waits for them"
    return f"no lines yet{waiting}. What it does now: valohai-dagster why {reference}"


def _as_dict(line: LogText) -> dict[str, Any]:
    return {
        "step": line.step,
        "execution": line.counter,
        "id": line.execution,
        "attempt": line.attempt,
        "stream": line.stream,
        "line": line.text,
    }
