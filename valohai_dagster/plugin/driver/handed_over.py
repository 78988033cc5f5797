"""The table of runs that conductors drive: written by launchers, closed by the conductor that has driven the run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import Enum
from typing import Any

import sqlalchemy as sa

from valohai_dagster.plugin.driver.handover import HandOver
from valohai_dagster.records.store import insert_ignore
from valohai_dagster.records.tables import runs


class RunState(str, Enum):
    driving = "driving"
    ended = "ended"


def record(conn: sa.Connection, handover: HandOver, *, shard: int, now: datetime) -> bool:
    """False when the run has been handed over before."""
    return insert_ignore(
        conn,
        runs,
        run_id=handover.run_id,
        instance_id=handover.instance_id,
        shard=shard,
        handover=handover.model_dump(mode="json"),
        state=RunState.driving.value,
        ctime=now,
    )


def find(conn: sa.Connection, run_ids: Sequence[str]) -> list[Any]:
    """Rows of those that were handed over, in the order in which that was."""
    query = sa.select(runs).where(runs.c.run_id.in_(run_ids)).order_by(runs.c.ctime)
    return list(conn.execute(query))


def driving(
    conn: sa.Connection, shards: Sequence[int], *, before: datetime | None = None
) -> list[str]:
    """Ids of runs that have not ended, oldest first; `before`: handed over before that moment."""
    query = sa.select(runs.c.run_id).where(
        runs.c.shard.in_(shards), runs.c.state == RunState.driving.value
    )
    if before is not None:
        query = query.where(runs.c.ctime < before)
    return list(conn.execute(query.order_by(runs.c.ctime)).scalars())


def close(conn: sa.Connection, run_id: str, *, now: datetime, reason: str = "") -> None:
    conn.execute(
        runs.update()
        .where(runs.c.run_id == run_id)
        .values(state=RunState.ended.value, ended_at=now, reason=reason or None)
    )
