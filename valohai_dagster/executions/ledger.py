"""Reads and writes of the execution tables: what the service knows must be here before it acts on it.

Plain functions over a connection; the caller owns the transaction.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from valohai_agent.protocol import Job, JobFile
from valohai_dagster.executions.memory import Active, Details, Grant, Metrics
from valohai_dagster.executions.spec_model import CommitRef, ExecutionSpec
from valohai_dagster.executions.stream import ExecutionStatus as Status
from valohai_dagster.records import tables as t
from valohai_dagster.records.store import insert_ignore

_UNFINISHED = [status.value for status in Status if not status.final]
_E, _A = t.executions.c, t.attempts.c


# -- projects and commits --------------------------------------------------------------------------------------


def ensure_project(conn: sa.Connection, name: str, now: datetime) -> str:
    """The project's id; of two processes that meet it first, one makes it."""
    c = t.projects.c
    query = sa.select(c.id).where(c.name == name)
    found = conn.execute(query).scalar_one_or_none()
    if found is None:
        insert_ignore(conn, t.projects, id=str(uuid.uuid4()), name=name, counter=0, ctime=now)
        found = conn.execute(query).scalar_one()
    return found


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
            used_at=now,
            **commit.model_dump(include=set(CommitRef.model_fields)),
        )


def take_counters(conn: sa.Connection, project_id: str, number: int) -> int:
    """The first of `number` new execution counters (T-05); the row is locked until the transaction ends."""
    c = t.projects.c
    query = (
        t.projects.update()
        .where(c.id == project_id)
        .values(counter=c.counter + number)
        .returning(c.counter)
    )
    return conn.execute(query).scalar_one() - number + 1


# -- new executions --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Created:
    """The identity of a new execution."""

    id: str
    shard: int
    project_id: str
    counter: int
    ctime: datetime


def execution_row(created: Created, spec: ExecutionSpec, group: str) -> dict[str, Any]:
    """All values of the row; what becomes known later is empty, so that all new rows have the same columns."""
    return {
        "id": created.id,
        "project_id": created.project_id,
        "counter": created.counter,
        "step": spec.step,
        "commit": spec.commit.identifier,
        "instance_id": spec.instance_id,
        "run_id": spec.run_id,
        "step_key": spec.step_key,
        "retry_number": spec.retry_number,
        "log_key": _joined(spec.log_key),
        "asset_key": _joined(spec.asset_key),
        "shard": created.shard,
        "group_name": group,
        "environment": spec.environment,
        "image": spec.image,
        "title": spec.title,
        "tags": spec.tags,
        "spec": spec.model_dump(mode="json"),
        "job": None,
        "sources": None,
        "status": Status.created.value,
        "status_detail": None,
        "reason": None,
        "exit_code": None,
        "attempt": 1,
        "cumulative_metadata": {},
        "interpolated_command": None,
        "stop_requested": 0,
        "priority": spec.priority,
        "ctime": created.ctime,
        "qtime": None,
        "started_at": None,
        "ended_at": None,
        "phases": [],
        "usage": None,
        "warnings": [],
        "restart_of": None,
        "restarts": 0,
        "price": None,
        "user_name": spec.creator or None,
        "team_name": ",".join(spec.teams) or None,
    }


def input_rows(job: Job, asked: Mapping[str, str]) -> list[dict[str, Any]]:
    """`asked`: by file id the URI that it was found by."""
    return [
        {
            "execution_id": job.execution_id,
            "file_id": file.id,
            "input": item.name,
            "name": file.name,
            "uri": file.uri,
            "datum_id": file.datum_id,
            "size": file.size,
            "cached": None,
            "version": _version_of(file),
            "asked": asked.get(file.id),
            **file.checksums.model_dump(),
        }
        for item in job.inputs
        for file in item.files
    ]


def _version_of(file: JobFile) -> str | None:
    """As its store called it when the input was resolved; what the agent then reports counts for more."""
    uri, _, version = (file.cache_key or "").rpartition("@")
    return version if uri == file.uri else None


def rejoined(spec: ExecutionSpec, shard: int) -> dict[str, Any]:
    """Another try of the step goes on with this execution: from now on it belongs, and its log, to that try."""
    return {
        "run_id": spec.run_id,
        "retry_number": spec.retry_number,
        "log_key": _joined(spec.log_key),
        "shard": shard,
    }


def _joined(key: Sequence[str] | None) -> str | None:
    return "/".join(key) if key else None


# -- what is known of an execution -----------------------------------------------------------------------------


def row_of(conn: sa.Connection, execution_id: str) -> Any:
    """The execution's row, or None."""
    query = sa.select(t.executions).where(_E.id == execution_id)
    return conn.execute(query).one_or_none()


def spec_of(row: Any) -> ExecutionSpec:
    """As it was submitted last: by which try, see `rejoined`."""
    tried = {"run_id": row.run_id, "retry_number": row.retry_number}
    log_key = row.log_key.split("/") if row.log_key else None
    return ExecutionSpec.model_validate({**row.spec, **tried, "log_key": log_key})


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which try an execution belongs to, and who looks after it."""

    shard: int
    run_id: str | None
    retry_number: int


def places_of(conn: sa.Connection, execution_ids: Collection[str]) -> dict[str, Place]:
    query = sa.select(_E.id, _E.shard, _E.run_id, _E.retry_number).where(_E.id.in_(execution_ids))
    return {
        row.id: Place(shard=row.shard, run_id=row.run_id, retry_number=row.retry_number)
        for row in conn.execute(query)
    }


def shard_of_execution(conn: sa.Connection, execution_id: str) -> int | None:
    return conn.execute(sa.select(_E.shard).where(_E.id == execution_id)).scalar_one_or_none()


def details_of(conn: sa.Connection, execution_id: str) -> Details:
    query = sa.select(_E.id, _E.project_id, _E.image, _E.spec, _E.job, _E.sources)
    row = conn.execute(query.where(_E.id == execution_id)).one()
    return Details(
        id=row.id,
        project_id=row.project_id,
        image=row.image,
        spec=row.spec,
        job=row.job or {},
        sources=row.sources,
    )


def metrics_of(conn: sa.Connection, execution_id: str) -> Metrics:
    c = t.metadata_events.c
    highest = sa.select(sa.func.max(c.number)).where(c.execution_id == execution_id)
    query = sa.select(_E.cumulative_metadata, highest.scalar_subquery().label("number"))
    row = conn.execute(query.where(_E.id == execution_id)).one()
    return Metrics(count=row.number or 0, latest=row.cumulative_metadata or {})


def attempt_reasons(conn: sa.Connection, execution_id: str) -> list[tuple[int, str]]:
    """Why earlier attempts ended, oldest first."""
    query = sa.select(_A.number, _A.reason).where(_A.execution_id == execution_id)
    rows = conn.execute(query.order_by(_A.number))
    return [(number, reason) for number, reason in rows if reason]


def active_of(conn: sa.Connection, execution_id: str) -> Active | None:
    return next(iter(_actives(conn, _E.id == execution_id)), None)


def unfinished(conn: sa.Connection, shards: Collection[int]) -> list[Active]:
    """All unfinished executions of the shards, oldest first."""
    mine = sa.and_(_E.shard.in_(shards), _E.status.in_(_UNFINISHED))
    return list(_actives(conn, mine))


def _actives(conn: sa.Connection, where: sa.ColumnElement[bool]) -> Iterable[Active]:
    condition = _E.spec["stop_condition"].as_string().label("condition")
    query = (
        sa.select(
            *(_E.id, _E.shard, _E.group_name, _E.status, _E.attempt, _E.stop_requested),
            *(_E.reason, _E.priority, _E.restarts, _A.token, _A.worker, _A.last_seq),
            *(_A.suspected_at, _A.reclaimed_at, condition),
        )
        .join(t.attempts, sa.and_(_A.execution_id == _E.id, _A.number == _E.attempt))
        .where(where)
        .order_by(_E.ctime)
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
            stop_reason=row.reason if row.stop_requested else None,
            suspected_at=row.suspected_at,
            reclaimed_at=row.reclaimed_at,
            restarts=row.restarts,
            priority=row.priority,
            condition=row.condition,
        )


# -- grants ----------------------------------------------------------------------------------------------------


def accept_grants(
    conn: sa.Connection, active: Active, upload_ids: Sequence[str], kind: str
) -> list[Grant]:
    """Uses up the grants that the present attempt was given and has not used before."""
    parameters = {
        "k_ids": list(upload_ids),
        "k_execution": active.id,
        "k_attempt": active.attempt,
        "k_kind": kind,
    }
    return [Grant(**row) for row in conn.execute(_ACCEPT, parameters).mappings()]


def mark_accepted(conn: sa.Connection, upload_ids: Sequence[str]) -> None:
    conn.execute(_MARK, {"k_ids": list(upload_ids)})


_G = t.grants.c
_THESE = _G.upload_id.in_(sa.bindparam("k_ids", expanding=True))
_MARK = t.grants.update().where(_THESE).values(accepted=True)
_ACCEPT = (
    _MARK.where(
        _G.execution_id == sa.bindparam("k_execution"),
        _G.attempt == sa.bindparam("k_attempt"),
        _G.kind == sa.bindparam("k_kind"),
        _G.accepted.is_(False),
    )
).returning(_G.upload_id, _G.execution_id, _G.attempt, _G.kind, _G.store, _G.key)


# -- shards ----------------------------------------------------------------------------------------------------


def take_shards(conn: sa.Connection, shards: Iterable[int], holder: str) -> dict[int, int]:
    """Makes the caller the only one who may write for the shards; their new fences.

    Waits for what an earlier holder is just committing; whatever that one tries later finds another fence.
    """
    c = t.shards.c
    fences: dict[int, int] = {}
    for shard in sorted(shards):
        insert_ignore(conn, t.shards, shard=shard, fence=0)
        values = {"fence": c.fence + 1, "holder": holder}
        query = t.shards.update().where(c.shard == shard).values(values).returning(c.fence)
        fences[shard] = conn.execute(query).scalar_one()
    return fences


def fences_of(conn: sa.Connection, shards: Collection[int]) -> Mapping[int, int]:
    """The fences in force; nobody takes these shards over before the transaction ends."""
    c = t.shards.c
    query = sa.select(c.shard, c.fence).where(c.shard.in_(shards)).with_for_update(read=True)
    return {row.shard: row.fence for row in conn.execute(query)}


def epochs_of(conn: sa.Connection, shards: Collection[int]) -> dict[int, str | None]:
    """Which Redis each shard was last served from, see `Keys.epoch`."""
    c = t.shards.c
    rows = conn.execute(sa.select(c.shard, c.epoch).where(c.shard.in_(shards)))
    return {row.shard: row.epoch for row in rows}


def set_epoch(conn: sa.Connection, shards: Collection[int], epoch: str) -> None:
    conn.execute(t.shards.update().where(t.shards.c.shard.in_(shards)).values(epoch=epoch))
