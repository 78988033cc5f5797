"""Builds what followers and people see of an execution from the records."""

from __future__ import annotations

from collections.abc import Callable
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
USAGE = (  # M-08: what the agent measured of the last attempt
    "max_memory_bytes",
    "cpu_seconds",
    "cpu_cores_average",
    "cpu_cores_peak",
    "gpu_memory_bytes_peak",
    "gpu_utilization_peak",
)


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


def outputs_of(
    conn: sa.Connection, execution_id: str, datum_url: DatumUrl | None
) -> list[DatumView]:
    """Datums of an execution in the order in which they became visible."""
    query = (
        sa.select(t.datums)
        .where(t.datums.c.execution_id == execution_id)
        .order_by(t.datums.c.ctime, t.datums.c.name)
    )
    return [datum_view(row, datum_url) for row in conn.execute(query)]


def inputs_of(conn: sa.Connection, execution_id: str) -> list[InputView]:
    c = t.execution_inputs.c
    query = (
        sa.select(t.execution_inputs)
        .where(c.execution_id == execution_id)
        .order_by(c.input, c.name)
    )
    return [
        InputView(
            input=row.input,
            name=row.name,
            uri=row.uri,
            size=row.size,
            sha256=row.sha256,
            datum_id=row.datum_id,
            cached=row.cached,
        )
        for row in conn.execute(query)
    ]


def attempts_of(conn: sa.Connection, execution_id: str) -> list[Any]:
    c = t.attempts.c
    return list(
        conn.execute(sa.select(t.attempts).where(c.execution_id == execution_id).order_by(c.number))
    )


def view_of(
    conn: sa.Connection, execution_id: str, *, datum_url: DatumUrl | None = None
) -> ExecutionView | None:
    """The whole view of one execution, or None if the records do not know it."""
    query = (
        sa.select(t.executions, t.projects.c.name.label("project_name"))
        .join(t.projects, t.projects.c.id == t.executions.c.project_id)
        .where(t.executions.c.id == execution_id)
    )
    row = conn.execute(query).one_or_none()
    if row is None:
        return None
    attempts = attempts_of(conn, execution_id)
    last = attempts[-1] if attempts else None
    job = row.job or {}
    usage = row.usage or {}
    return ExecutionView(
        id=row.id,
        counter=row.counter,
        project=row.project_name,
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
        inputs=inputs_of(conn, execution_id),
        outputs=outputs_of(conn, execution_id, datum_url),
        latest_metadata=row.cumulative_metadata or {},
        phases=row.phases or [],
        warnings=job.get("notices", []),
        **{name: usage.get(name) for name in USAGE},
        ctime=row.ctime,
        qtime=row.qtime,
        started_at=row.started_at,
        ended_at=row.ended_at,
    )
