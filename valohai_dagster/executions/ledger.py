"""Writes and reads of the execution tables: what the service knows must be here before it acts on it.

Plain functions over a connection; the caller owns the transaction.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from valohai_agent.protocol import Job
from valohai_dagster.executions.spec_model import CommitRef, ExecutionSpec
from valohai_dagster.executions.stream import ExecutionStatus as Status
from valohai_dagster.records import tables as t
from valohai_dagster.records.store import insert_ignore

_UNFINISHED = [status.value for status in Status if not status.final]


@dataclass(frozen=True, kw_only=True)
class Active:
    """What the service keeps in memory of an unfinished execution; a few hundred bytes."""

    id: str
    shard: int
    group: str
    status: Status
    attempt: int
    token: str | None
    worker: str | None
    last_seq: int
    stop_requested: int  # 0 no, 1 soft, 2 hard
    suspected_at: datetime | None
    priority: int = 0
    condition: str | None = None  # M-40


def ensure_project(conn: sa.Connection, name: str, now: datetime) -> str:
    """The project's id; several processes may add it at once."""
    query = sa.select(t.projects.c.id).where(t.projects.c.name == name)
    found = conn.execute(query).scalar_one_or_none()
    if found:
        return found
    insert_ignore(conn, t.projects, id=str(uuid.uuid4()), name=name, counter=0, ctime=now)
    return conn.execute(query).scalar_one()


def next_counter(conn: sa.Connection, project_id: str) -> int:
    """The project's next execution counter (T-05); the update locks the row until the transaction ends."""
    c = t.projects.c
    conn.execute(t.projects.update().where(c.id == project_id).values(counter=c.counter + 1))
    return conn.execute(sa.select(c.counter).where(c.id == project_id)).scalar_one()


def ensure_commit(conn: sa.Connection, project_id: str, commit: CommitRef, now: datetime) -> None:
    """Adds the commit unless it is there."""
    c = t.commits.c
    known = sa.select(c.id).where(c.project_id == project_id, c.identifier == commit.identifier)
    if conn.execute(known).first() is None:
        insert_ignore(
            conn,
            t.commits,
            id=str(uuid.uuid4()),
            project_id=project_id,
            ctime=now,
            **commit.model_dump(include=set(CommitRef.model_fields)),
        )


def known_commit(conn: sa.Connection, project: str, identifier: str) -> CommitRef | None:
    """A commit whose archive is in a store, since it ran or was published before."""
    c = t.commits.c
    query = (
        sa.select(t.commits)
        .join(t.projects, t.projects.c.id == c.project_id)
        .where(t.projects.c.name == project, c.identifier == identifier)
    )
    row = conn.execute(query).one_or_none()
    if row is None:
        return None
    return CommitRef(**{name: getattr(row, name) for name in CommitRef.model_fields})


def create_execution(
    conn: sa.Connection, spec: ExecutionSpec, *, shard: int, group: str, now: datetime
) -> Any:
    """Inserts the execution in state `created` (L-01) and returns its row."""
    project_id = ensure_project(conn, spec.project.name, now)
    ensure_commit(conn, project_id, spec.commit, now)
    conn.execute(
        t.executions.insert().values(
            id=spec.execution_id,
            project_id=project_id,
            counter=next_counter(conn, project_id),
            step=spec.step,
            commit=spec.commit.identifier,
            instance_id=spec.instance_id,
            run_id=spec.run_id,
            step_key=spec.step_key,
            retry_number=spec.retry_number,
            log_key="/".join(spec.log_key) if spec.log_key else None,
            asset_key="/".join(spec.asset_key) if spec.asset_key else None,
            shard=shard,
            group_name=group,
            environment=spec.environment,
            image=spec.image,
            title=spec.title,
            tags=spec.tags,
            spec=spec.model_dump(mode="json"),
            status=Status.created.value,
            priority=spec.priority,
            ctime=now,
        )
    )
    conn.execute(t.attempts.insert().values(execution_id=spec.execution_id, number=1))
    return row_of(conn, spec.execution_id)


def row_of(conn: sa.Connection, execution_id: str) -> Any:
    """The execution's row, or None."""
    query = sa.select(t.executions).where(t.executions.c.id == execution_id)
    return conn.execute(query).one_or_none()


def shard_of_execution(conn: sa.Connection, execution_id: str) -> int | None:
    c = t.executions.c
    return conn.execute(sa.select(c.shard).where(c.id == execution_id)).scalar_one_or_none()


def update(conn: sa.Connection, execution_id: str, **values: Any) -> None:
    conn.execute(t.executions.update().where(t.executions.c.id == execution_id).values(**values))


def update_attempt(conn: sa.Connection, execution_id: str, number: int, **values: Any) -> None:
    c = t.attempts.c
    where = sa.and_(c.execution_id == execution_id, c.number == number)
    conn.execute(t.attempts.update().where(where).values(**values))


def rejoined(conn: sa.Connection, spec: ExecutionSpec) -> None:
    """Another try of the step goes on with this execution: from now on it belongs, and its log, to that try."""
    update(
        conn,
        spec.execution_id,
        run_id=spec.run_id,
        retry_number=spec.retry_number,
        log_key="/".join(spec.log_key) if spec.log_key else None,
    )


def record_job(conn: sa.Connection, job: Job, sources: bytes, now: datetime) -> None:
    """The resolved job, its input files, and the move to `queued`."""
    values = {"job": job.model_dump(mode="json"), "sources": sources}
    update(conn, job.execution_id, **values, status=Status.queued.value, qtime=now)
    rows = [
        {
            "execution_id": job.execution_id,
            "file_id": file.id,
            "input": item.name,
            "name": file.name,
            "uri": file.uri,
            "datum_id": file.datum_id,
            "size": file.size,
            **file.checksums.model_dump(),
        }
        for item in job.inputs
        for file in item.files
    ]
    if rows:
        conn.execute(t.execution_inputs.insert(), rows)


def start_attempt(conn: sa.Connection, execution_id: str, number: int) -> None:
    conn.execute(t.attempts.insert().values(execution_id=execution_id, number=number))
    update(conn, execution_id, attempt=number, status=Status.queued.value)


def attempt_reasons(conn: sa.Connection, execution_id: str) -> list[tuple[int, str]]:
    """Why earlier attempts ended, oldest first."""
    c = t.attempts.c
    query = sa.select(c.number, c.reason).where(c.execution_id == execution_id).order_by(c.number)
    return [(number, reason) for number, reason in conn.execute(query) if reason]


def active_of(conn: sa.Connection, execution_id: str) -> Active | None:
    return next(iter(_actives(conn, t.executions.c.id == execution_id)), None)


def unfinished(conn: sa.Connection) -> list[Active]:
    """All unfinished executions, for a service that has just started."""
    return list(_actives(conn, t.executions.c.status.in_(_UNFINISHED)))


def _actives(conn: sa.Connection, where: sa.ColumnElement[bool]) -> Iterable[Active]:
    e, a = t.executions.c, t.attempts.c
    query = (
        sa.select(t.executions, a.token, a.worker, a.last_seq, a.suspected_at)
        .join(t.attempts, sa.and_(a.execution_id == e.id, a.number == e.attempt))
        .where(where)
        .order_by(e.ctime)
    )
    for row in conn.execute(query):
        yield Active(
            id=row.id,
            shard=row.shard,
            group=row.group_name,
            status=Status(row.status),
            attempt=row.attempt,
            token=row.token,
            worker=row.worker,
            last_seq=row.last_seq,
            stop_requested=row.stop_requested,
            suspected_at=row.suspected_at,
            priority=row.priority,
            condition=(row.spec or {}).get("stop_condition"),
        )
