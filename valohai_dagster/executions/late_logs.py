"""Stores the logs of attempts that ended without having stored theirs, since their store was away then.

What there is: the files of an agent on this host, else the live log, for as long as Redis keeps that. Tried again until
the store takes it or nothing is left. Any number of conductors do this, each for its shards.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.executions.dispatch import LIVE_LOG_SECONDS
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.salvage import STREAMS, Supervisor, recorded, salvage
from valohai_dagster.executions.shards import Shards
from valohai_dagster.executions.writing import Writing
from valohai_dagster.records import tables as t

log = logging.getLogger(__name__)

LOOK_SECONDS = 15.0
CHUNK = 500  # executions that one query names

_E = t.executions.c
_A = t.attempts.c


@dataclass(frozen=True, kw_only=True)
class Unstored:
    """An attempt that is over and lacks these streams in its record."""

    execution_id: str
    attempt: int
    group: str
    streams: tuple[str, ...]


class LateLogs:
    """`step` in an endless loop."""

    def __init__(self, core: ServiceCore, shards: Shards, groups: Mapping[str, Supervisor]) -> None:
        self._core = core
        self._shards = shards
        self._groups = groups
        self._known: frozenset[int] = frozenset()  # shards whose past has been looked at
        self._ended: set[str] = set()  # executions to look at
        core.on_delivered(self._note)

    def _note(self, outbox: Outbox) -> None:
        self._ended.update(execution_id for _, execution_id, _ in outbox.ended)

    async def step(self) -> None:
        await self.look()
        await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """One look at what has ended; what cannot be stored now stays for the next."""
        held = frozenset(s for s in self._shards.held if self._shards.may_write(s))
        new, ended = held - self._known, self._ended.copy()
        since = self._core.clock() - timedelta(seconds=LIVE_LOG_SECONDS)
        found = await self._core.read(lambda conn: _unstored(conn, since, held, new, ended))
        waiting: dict[str, list[Unstored]] = defaultdict(list)
        for item in found:
            waiting[item.execution_id].append(item)
        self._known = held
        self._ended = (self._ended - ended) | waiting.keys()
        for execution_id, items in waiting.items():
            if all([await self._store(item) for item in items]):
                self._ended.discard(execution_id)

    async def _store(self, item: Unstored) -> bool:
        """Whether there is nothing more to be done."""
        logs = await salvage(
            self._core,
            self._groups,
            group=item.group,
            execution_id=item.execution_id,
            attempt=item.attempt,
            streams=item.streams,
        )
        if logs is None:
            return True
        if logs:
            await self._core.transact(lambda writing: _keep(writing, item, logs))
            text = "stored the log of attempt %d, which its agent could not: %s"
            extra = {"action": "late-log", "execution": item.execution_id}
            log.info(text, item.attempt, ", ".join(logs), extra=extra)
        return len(logs) == len(item.streams)


def _unstored(
    conn: sa.Connection,
    since: datetime,
    held: Collection[int],
    new: Collection[int],
    ended: Collection[str],
) -> list[Unstored]:
    """Of the executions that have ended since then: all of the `new` shards, and those that are named."""
    over = sa.func.coalesce(_E.ended_at, _A.ended_at) > sa.literal(since, _E.ended_at.type)
    query = (
        sa.select(_E.id, _E.group_name, _A.number, _A.logs)
        .join(t.attempts, _A.execution_id == _E.id)
        .where(_A.ended_at.is_not(None), over, _E.shard.in_(held))
    )
    rows = {}
    names = sorted(ended)
    wheres = [_E.id.in_(names[first : first + CHUNK]) for first in range(0, len(names), CHUNK)]
    for where in [*wheres, *([_E.shard.in_(new)] if new else [])]:
        rows.update({(row.id, row.number): row for row in conn.execute(query.where(where))})
    found = []
    for (execution_id, attempt), row in rows.items():
        streams = tuple(stream for stream in STREAMS if stream not in (row.logs or {}))
        if streams:
            item = Unstored(
                execution_id=execution_id, attempt=attempt, group=row.group_name, streams=streams
            )
            found.append(item)
    return found


def _keep(writing: Writing, item: Unstored, logs: Mapping[str, Any]) -> None:
    active = writing.find(item.execution_id)
    if active is None:
        return
    mine = sa.and_(_A.execution_id == item.execution_id, _A.number == item.attempt)
    conn = writing.touch(active)
    known = conn.execute(sa.select(_A.logs).where(mine)).scalar_one()
    new = recorded(conn, {stream: log for stream, log in logs.items() if stream not in known})
    writing.update_attempt(active, item.attempt, logs={**new, **known})
