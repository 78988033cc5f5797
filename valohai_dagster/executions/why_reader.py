"""Gathers what `why` explains: the records of one execution, and what Redis knows of it at this moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import redis
import sqlalchemy as sa

from valohai_agent.protocol import Keys, Worker, utcnow
from valohai_dagster.errors import NotFoundError
from valohai_dagster.executions.capacity_state import read_state
from valohai_dagster.executions.stream import ExecutionStatus, FollowEvent
from valohai_dagster.executions.why import Conductor, Explanation, Facts, explain_execution
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import (
    AnyGroupSettings,
    CloudGroupSettings,
    LocalGroupSettings,
)

SHOWN = 5  # other executions that are named
LOOKED_AT = 200  # newest entries of the follow stream; the phase is among them, or in the lease
_UNFINISHED = [status.value for status in ExecutionStatus if not status.final]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where everything is read. `broker` is None, or raises, while Redis is away."""

    records: Records
    broker: redis.Redis | None
    keys: Keys
    settings: Settings


def why_execution(
    sources: Sources, execution_id: str, *, now: datetime | None = None
) -> Explanation:
    """Raises NotFoundError for an execution that the records do not have."""
    with sources.records.read() as conn:
        row = _row(conn, execution_id)
        if row is None:
            raise NotFoundError(f"there is no execution {execution_id} in the records")
        attempts = _attempts(conn, execution_id)
    known = _of_records(row, attempts, sources.settings)
    if not known["status"].final:
        known.update(_of_redis(sources, row))
    if known.get("ahead") is not None:
        known.update(_others(sources, row.group_name, known.pop("ids_ahead", ())))
    known.pop("ids_ahead", None)
    return explain_execution(Facts(**known, now=now or utcnow()))


def conductor_of(broker: redis.Redis, keys: Keys, shard: int) -> Conductor:
    """Who looks after a shard."""
    if broker.exists(keys.shard(shard)):
        return "there"
    now: Any = broker.time()
    milliseconds = now[0] * 1000 + now[1] // 1000
    living: Any = broker.zcount(keys.conductors(), milliseconds, "+inf")
    if living:
        return "elsewhere"
    return "there" if broker.exists(keys.service()) else "nobody"


def label_of(row: Any) -> str:
    """
    `digits#12 train`
    """
    return f"{row.project_name}#{row.counter} {row.step}"


# -- the records ------------------------------------------------------------------------------------------------------


def _row(conn: sa.Connection, execution_id: str) -> Any:
    query = _with_project().where(t.executions.c.id == execution_id)
    return conn.execute(query).one_or_none()


def _with_project() -> sa.Select[Any]:
    return sa.select(t.executions, t.projects.c.name.label("project_name")).join(
        t.projects, t.projects.c.id == t.executions.c.project_id
    )


def _attempts(conn: sa.Connection, execution_id: str) -> Sequence[Any]:
    c = t.attempts.c
    query = sa.select(t.attempts).where(c.execution_id == execution_id).order_by(c.number)
    return conn.execute(query).all()


def _of_records(row: Any, attempts: Sequence[Any], settings: Settings) -> dict[str, Any]:
    last = attempts[-1] if attempts else None
    group = settings.groups.get(row.group_name)
    lost = (a for a in attempts if a.number < row.attempt and a.reason)
    return {
        "id": row.id,
        "label": label_of(row),
        "run_id": row.run_id,
        "status": ExecutionStatus(row.status),
        "group": row.group_name,
        "attempt": row.attempt,
        "reason": row.reason,
        "status_detail": row.status_detail,
        "exit_code": row.exit_code,
        "stop_requested": row.stop_requested,
        "created_at": row.ctime,
        "started_at": row.started_at,
        "ended_at": row.ended_at,
        "shard": row.shard,
        "worker": last.worker if last else None,
        "host": last.host if last else None,
        "leased_at": last.leased_at if last else None,
        "suspected_at": last.suspected_at if last else None,
        "warnings": (*(row.job or {}).get("notices", ()), *(row.warnings or ())),
        "losses": tuple(f"{a.number}: {a.reason}" for a in lost),
        "group_kind": _kind(group),
        "max_agents": group.max_agents if isinstance(group, LocalGroupSettings) else None,
        "lost_grace_seconds": settings.lost_grace_seconds,
    }


def _kind(group: AnyGroupSettings | None) -> str:
    if isinstance(group, CloudGroupSettings):
        return "cloud"
    if group is None:
        return "unknown"
    return "local" if isinstance(group, LocalGroupSettings) else "static"


def _others(sources: Sources, group: str, ids_ahead: Sequence[str]) -> dict[str, Any]:
    """Names of those at the head of the queue, and of those that have the slots."""
    e, a = t.executions.c, t.attempts.c
    running = (
        _with_project()
        .add_columns(a.worker)
        .join(t.attempts, sa.and_(a.execution_id == e.id, a.number == e.attempt))
        .where(e.group_name == group, e.status.in_(_UNFINISHED), a.worker.is_not(None))
        .order_by(a.leased_at)
        .limit(SHOWN)
    )
    with sources.records.read() as conn:
        names = {
            row.id: label_of(row)
            for row in conn.execute(_with_project().where(e.id.in_(ids_ahead)))
        }
        slots = tuple(f"{label_of(row)} on {row.worker}" for row in conn.execute(running))
    ahead = tuple(names[one] for one in ids_ahead if one in names)
    return {"ahead_of_it": ahead, "on_the_slots": slots}


# -- Redis ------------------------------------------------------------------------------------------------------------


def _of_redis(sources: Sources, row: Any) -> dict[str, Any]:
    broker, keys = sources.broker, sources.keys
    if broker is None:
        return {"redis_away": "it could not be connected to"}
    try:
        lease: Any = broker.hgetall(keys.lease(row.group_name, row.id))
        ahead: Any = broker.zrank(keys.ready(row.group_name), row.id)
        first: Any = broker.zrange(keys.ready(row.group_name), 0, SHOWN - 1) if ahead else []
        return {
            "conductor": conductor_of(broker, keys, row.shard),
            "ahead": ahead,
            "ids_ahead": tuple(first[:ahead]) if ahead else (),
            "lease_worker": lease.get("worker"),
            "workers": workers_of(broker, keys, row.group_name) if ahead is not None else (),
            "machines": read_state(broker, keys, row.group_name),
            **_of_stream(broker, keys, row, lease.get("phase")),
        }
    except redis.RedisError as error:
        return {"redis_away": str(error)}


def workers_of(broker: redis.Redis, keys: Keys, group: str) -> tuple[Worker, ...]:
    """Workers of the group that have checked in and not fallen silent."""
    names: Any = broker.smembers(keys.roster(group))
    entries: Iterable[Mapping[str, Any]] = [
        broker.hgetall(keys.worker(group, name))  # pyright: ignore[reportAssignmentType]
        for name in sorted(names)
    ]
    return tuple(
        Worker.model_validate({"group": group, **fields})
        for fields in entries
        if "name" in fields and "incarnation" in fields
    )


def _of_stream(
    broker: redis.Redis, keys: Keys, row: Any, lease_phase: str | None
) -> dict[str, Any]:
    """Phase, its progress and beginning, and the answer to a stop, from what followers were told."""
    entries: Any = broker.xrevrange(keys.follow(row.id), count=LOOKED_AT)
    events = [FollowEvent.model_validate_json(fields["e"]) for _, fields in entries]
    mine = [event for event in events if event.attempt == row.attempt]
    found: dict[str, Any] = {}
    phase = next((e for e in mine if e.data.get("phase")), None)
    if phase is not None:
        name = phase.data["phase"]
        begun = [e for e in mine if e.data.get("phase") == name and "done" not in e.data]
        found["phase"], found["phase_text"] = name, phase.message or name
        found["phase_since"] = begun[0].time if begun else None
    elif lease_phase and lease_phase != "leased":
        found["phase"] = lease_phase
    answer = next((e for e in mine if e.data.get("signal")), None)
    if answer is not None:
        found["acknowledged"] = answer.message
    return found
