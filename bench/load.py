"""A load of runs for the benchmarks: made before the clock starts, handed over, and measured from the database.

Moments are commits as Postgres saw them (`track_commit_timestamp`), so nobody's polling is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa

from tests.support.installation import Installation
from tests.support.launchpad import PROJECT, Launchpad
from tests.support.service import make_spec
from valohai_dagster.executions.client import ExecutionClient
from valohai_dagster.executions.spec_model import ExecutionSpec, ProjectRef
from valohai_dagster.settings import load_settings

POSTGRES_OPTIONS = ("track_commit_timestamp=on",)
POLL_SECONDS = 0.25
STEP = "hello"
VALOHAI_YAML = """\
- step:
    name: hello
    image: python:3.11-slim
    command: python hello.py {parameters}
    parameters:
      - {name: size, type: integer, default: 3}
"""
_COMMIT = "extract(epoch from pg_xact_commit_timestamp(xmin))::float8"
REPORT_TO_EVENT = {"leased": "STEP_START", "finished": "PIPELINE_SUCCESS"}


class Load(Protocol):
    """`ended` gives the moment of the last commit for each item that has ended well."""

    def prepare(self, number: int) -> list[str]: ...

    def hand_over(self, items: Sequence[str], told: Callable[[str], None]) -> None: ...

    def ended(self, items: Collection[str]) -> dict[str, float]: ...

    def events(self, items: Collection[str]) -> list[tuple[str, str, float]]:
        """(item, type, moment) of everything that was written of them."""
        ...


class RunLoad:
    """Runs of one step each, handed over by Dagster's own `launch_run` and our launcher."""

    def __init__(self, pad: Launchpad, engine: sa.Engine) -> None:
        self._pad, self._engine = pad, engine

    def prepare(self, number: int) -> list[str]:
        return self._pad.create(number, [STEP])

    def hand_over(self, items: Sequence[str], told: Callable[[str], None]) -> None:
        self._pad.hand_over(items, told=told)

    def ended(self, items: Collection[str]) -> dict[str, float]:
        query = (
            f"SELECT run_id, {_COMMIT} FROM runs WHERE run_id = ANY(:ids) AND status = 'SUCCESS'"
        )
        return dict(_rows(self._engine, query, items))

    def events(self, items: Collection[str]) -> list[tuple[str, str, float]]:
        query = (
            f"SELECT run_id, dagster_event_type, {_COMMIT} FROM event_logs"
            " WHERE run_id = ANY(:ids) AND dagster_event_type IS NOT NULL"
        )
        return _rows(self._engine, query, items)


class ServiceLoad:
    """Executions without runs: what the execution service alone can do."""

    def __init__(self, client: ExecutionClient, engine: sa.Engine) -> None:
        self._client, self._engine = client, engine
        self._specs: dict[str, ExecutionSpec] = {}

    def prepare(self, number: int) -> list[str]:
        specs = [make_spec(project=ProjectRef(name=PROJECT)) for _ in range(number)]
        self._specs.update({spec.execution_id: spec for spec in specs})
        return [spec.execution_id for spec in specs]

    def hand_over(self, items: Sequence[str], told: Callable[[str], None]) -> None:
        for item in items:
            self._client.submit(self._specs[item])
            told(item)

    def ended(self, items: Collection[str]) -> dict[str, float]:
        query = (
            f"SELECT id, {_COMMIT} FROM vh_executions WHERE id = ANY(:ids) AND status = 'complete'"
        )
        return dict(_rows(self._engine, query, items))

    def events(self, items: Collection[str]) -> list[tuple[str, str, float]]:
        return []


def open_load(kind: str, installation: Installation, pad: Launchpad) -> Load:
    engine = sa.create_engine(installation.postgres_url)
    if kind == "runs":
        return RunLoad(pad, engine)
    return ServiceLoad(ExecutionClient.open(load_settings()), engine)


def _rows(engine: sa.Engine, query: str, items: Collection[str]) -> list[Any]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(query), {"ids": list(items)})]


def wait_until_ended(load: Load, items: Collection[str], *, seconds: float) -> dict[str, float]:
    """Raises AssertionError when some have not ended by then."""
    deadline = time.monotonic() + seconds
    while len(ended := load.ended(items)) < len(items):
        assert time.monotonic() < deadline, f"{len(ended)} of {len(items)} ended in {seconds:g} s"
        time.sleep(POLL_SECONDS)
    return ended


@dataclass(frozen=True, kw_only=True)
class Lags:
    """Seconds from the delivery of a report to the commit of the event that tells of it."""

    p50: float
    p95: float
    p99: float
    longest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Lags | None:
        if len(values) < 2:
            return None
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        return cls(p50=cuts[49], p95=cuts[94], p99=cuts[98], longest=max(values))


def report_lags(
    reports: Sequence[dict[str, Any]], events: Sequence[tuple[str, str, float]]
) -> Lags | None:
    """Pairs the first report of a kind with the event that follows from it, run by run."""
    sent: dict[tuple[str, str], float] = {}
    for report in reports:
        sent.setdefault((report["r"] or report["e"], report["k"]), report["t"])
    written = {(item, kind): moment for item, kind, moment in events}
    lags = [
        written[item, event] - moment
        for (item, report), moment in sent.items()
        if (event := REPORT_TO_EVENT.get(report)) and (item, event) in written
    ]
    return Lags.of(lags)
