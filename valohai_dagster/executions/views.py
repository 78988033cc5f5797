"""Builds what followers and people see of an execution from the records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from valohai_dagster.executions.stream import (
    AttemptView,
    DatumView,
    ExecutionStatus,
    ExecutionView,
    InputView,
)
from valohai_dagster.records import tables as t

DatumUrl = Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which execution made a datum."""

    execution_id: str
    run_id: str | None
    asset_key: str | None  # joined with /


USAGE = (  # M-08: what the agent measured of the last attempt
    "max_memory_bytes",
    "cpu_seconds",
    "cpu_cores_average",
    "cpu_cores_peak",
    "gpu_memory_bytes_peak",
    "gpu_utilization_peak",
)


_SHOWN = [c for c in t.executions.c if c.name not in ("spec", "sources")]


def datum_view(row: Any, datum_url: DatumUrl | None = None) -> DatumView:
    """`row`: a row of `vh_datums`; `datum_url`: durable address of a datum id."""
    return DatumView(
        id=row.id,
        name=row.name,
        size=row.size,
        md5=row.md5,
        sha1=row.sha1,
        sha256=row.sha256,
        uri=f"datum://{row.id}",
        url=datum_url(row.id) if datum_url else None,
        metadata=row.metadata or {},
    )


def input_view(row: Any) -> InputView:
    return InputView(
        input=row.input,
        name=row.name,
        uri=row.uri,
        size=row.size,
        sha256=row.sha256,
        datum_id=row.datum_id,
        cached=row.cached,
        version=row.version,
        asked=row.asked,
    )


def origins_of(conn: sa.Connection, datum_ids: Collection[str]) -> dict[str, Origin]:
    """By datum id; uploads, and files of lost attempts, which no asset got, are left out."""
    e = t.executions.c
    query = (
        sa.select(t.datums.c.id.label("datum_id"), e.id, e.run_id, e.asset_key)
        .join(t.executions, e.id == t.datums.c.execution_id)
        .where(t.datums.c.id.in_(datum_ids), t.datums.c.withdrawn.is_(False))
    )
    return {
        row.datum_id: Origin(execution_id=row.id, run_id=row.run_id, asset_key=row.asset_key)
        for row in conn.execute(query)
    }


def view_of(
    conn: sa.Connection, execution_id: str, *, datum_url: DatumUrl | None = None
) -> ExecutionView | None:
    """The whole view of one execution, or None if the records do not know it."""
    return views_of(conn, [execution_id], datum_url=datum_url).get(execution_id)


def views_of(
    conn: sa.Connection, execution_ids: Collection[str], *, datum_url: DatumUrl | None = None
) -> dict[str, ExecutionView]:
    """The views of several executions in the same few queries."""
    query = (
        sa.select(*_SHOWN, t.projects.c.name.label("project_name"))
        .join(t.projects, t.projects.c.id == t.executions.c.project_id)
        .where(t.executions.c.id.in_(execution_ids))
    )
    rows = conn.execute(query).all()
    attempts = _by_execution(conn, t.attempts, execution_ids, t.attempts.c.number)
    d = t.datums.c
    counts = d.withdrawn.is_(False)
    outputs = _by_execution(conn, t.datums, execution_ids, d.ctime, d.name, where=counts)
    with_inputs = [row.id for row in rows if (row.job or {}).get("inputs")]
    c = t.execution_inputs.c
    inputs = _by_execution(conn, t.execution_inputs, with_inputs, c.input, c.name)
    stopped = [row.id for row in rows if row.status == ExecutionStatus.stopped.value]
    continued = continued_by(conn, stopped) if stopped else {}
    return {
        row.id: execution_view(
            row,
            row.project_name,
            attempts=attempts[row.id],
            inputs=[input_view(item) for item in inputs[row.id]],
            outputs=[datum_view(item, datum_url) for item in outputs[row.id]],
            continued_by=continued.get(row.id),
        )
        for row in rows
    }


def continued_by(conn: sa.Connection, execution_ids: Collection[str]) -> dict[str, str]:
    """Which execution continues each of these, where one does (L-32)."""
    c = t.executions.c
    query = sa.select(c.restart_of, c.id).where(c.restart_of.in_(execution_ids))
    return {row.restart_of: row.id for row in conn.execute(query)}


def _by_execution(
    conn: sa.Connection,
    table: sa.Table,
    execution_ids: Collection[str],
    *order: sa.Column[Any],
    where: sa.ColumnElement[bool] | None = None,
) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    if execution_ids:
        mine = table.c.execution_id.in_(execution_ids)
        query = sa.select(table).where(mine if where is None else sa.and_(mine, where))
        for row in conn.execute(query.order_by(*order)):
            found[row.execution_id].append(row)
    return found


def execution_view(
    row: Any,
    project_name: str,
    *,
    attempts: Sequence[Any],
    inputs: list[InputView],
    outputs: list[DatumView],
    continued_by: str | None = None,
) -> ExecutionView:
    """`row`: the columns of the execution; `attempts`: rows of its attempts, oldest first."""
    last = attempts[-1] if attempts else None
    job, usage = row.job or {}, row.usage or {}
    return ExecutionView(
        id=row.id,
        counter=row.counter,
        project=project_name,
        project_id=row.project_id,
        step=row.step,
        commit=row.commit,
        image=row.image,
        status=ExecutionStatus(row.status),
        status_detail=row.status_detail,
        reason=row.reason,
        exit_code=row.exit_code,
        environment=row.environment or row.group_name,
        group=row.group_name,
        run_id=row.run_id,
        step_key=row.step_key,
        worker=last.worker if last else None,
        host=last.host if last else None,
        runtime=last.runtime if last else None,
        attempt=row.attempt,
        attempts=[
            AttemptView(number=a.number, worker=a.worker, end=a.end, reason=a.reason)
            for a in attempts
        ],
        command=row.interpolated_command or "\n".join(job.get("commands", [])) or None,
        parameters=job.get("parameters", {}),
        inputs=inputs,
        outputs=outputs,
        latest_metadata=row.cumulative_metadata or {},
        phases=row.phases or [],
        warnings=[*job.get("notices", []), *(row.warnings or [])],
        **{name: usage.get(name) for name in USAGE},
        ctime=row.ctime,
        qtime=row.qtime,
        started_at=row.started_at,
        ended_at=row.ended_at,
        price=row.price,
        restarts=row.restarts,
        restart_of=row.restart_of,
        continued_by=continued_by,
    )
