"""Watches over executions that nobody reports on: lost leases, lost queue entries, stops without an answer."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Protocol

from valohai_dagster.executions import ledger
from valohai_dagster.executions.core import ServiceCore, queued_event
from valohai_dagster.executions.dispatch import QueueEntry
from valohai_dagster.executions.grants import job_of
from valohai_dagster.executions.lifecycle import STOP_ACKNOWLEDGEMENT
from valohai_dagster.executions.losses import Losses
from valohai_dagster.executions.memory import Active
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.shards import Shards
from valohai_dagster.executions.stream import EventKind, ExecutionStatus
from valohai_dagster.executions.wait_telling import WaitTelling
from valohai_dagster.executions.writing import Writing

log = logging.getLogger(__name__)

MISSING_LOOKS = 3  # looks in a row that found an execution neither queued nor leased
FEW = 500  # executions that one tick looks at; more of them take turns
ROUND = 5  # ticks at most until it is an execution's turn again
QUEUED_AT_ONCE = 100  # that one round trip puts back into an emptied Redis


class Deaths(Protocol):
    """Which workers are surely dead."""

    def is_dead(self, group: str, worker: str) -> bool: ...

    def is_local(self, group: str) -> bool: ...


class LeaseWatch:
    """Part of the service; `tick()` about once a second."""

    def __init__(self, core: ServiceCore, shards: Shards, losses: Losses, deaths: Deaths) -> None:
        self._core = core
        self._shards = shards
        self._losses = losses
        self._deaths = deaths
        self._stops: dict[str, datetime] = {}  # forwarded, not acknowledged yet
        self._missing: dict[str, int] = {}
        self._turn = 0
        self._waits = WaitTelling(core, deaths.is_local)
        core.on_delivered(self._note)

    def _note(self, outbox: Outbox) -> None:
        """Stops that were forwarded and answered."""
        for execution_id in outbox.stops_sent:
            self._stops.setdefault(execution_id, self._core.clock())
        for execution_id in outbox.stops_answered:
            self._stops.pop(execution_id, None)

    async def tick(self) -> None:
        await self._look_for_emptied_redis()
        ours = [
            a
            for a in self._core.memory.all()
            if self._shards.may_write(a.shard) and a.status is not ExecutionStatus.created
        ]
        await self._look_at(self._in_turn(ours))
        await self._look_at_stops()
        await self._waits.look([a for a in ours if a.status is ExecutionStatus.queued])

    async def workers_gone(self, dead: Mapping[tuple[str, str], str]) -> None:
        """Supervisors are sure that these workers (group, name) are dead, and how: their leases are over at once."""
        for active in self._core.memory.all():
            what = dead.get((active.group, active.worker or ""))
            if what is not None:
                await self._core.dispatch.drop_lease(active.group, active.id)
                await self._losses.handle(active, death_confirmed=True, what=what)

    # -- leases ------------------------------------------------------------------------------------------------
    def _in_turn(self, actives: Sequence[Active]) -> list[Active]:
        """All if they are few; else a part, and those that were missing at the last look."""
        if len(actives) <= FEW:
            return list(actives)
        size = max(FEW, -(-len(actives) // ROUND))
        parts = -(-len(actives) // size)
        self._turn = (self._turn + 1) % parts
        start = self._turn * size
        rest = (*actives[:start], *actives[start + size :])
        unsure = (a for a in rest if a.id in self._missing or a.suspected_at is not None)
        return [*actives[start : start + size], *unsure]

    async def _look_at(self, actives: Sequence[Active]) -> None:
        dispatch = self._core.dispatch
        waits = await dispatch.queued((a.group, a.id) for a in actives if a.token is None)
        others = [active for active in actives if active.id not in waits]
        leased = await dispatch.leased((active.group, active.id) for active in others)
        self._missing = {i: n for i, n in self._missing.items() if i not in waits | leased}
        for active in others:
            if active.id not in leased:
                await self._not_there(active)
            elif active.suspected_at is not None:
                await self._losses.back(active)

    async def _not_there(self, active: Active) -> None:
        # A lease vanishes for a moment between an agent's report and its application: look again first.
        if active.id not in self._core.memory.active:
            self._missing.pop(active.id, None)
            return
        self._missing[active.id] = self._missing.get(active.id, 0) + 1
        if self._missing[active.id] < MISSING_LOOKS:
            return
        if active.worker is None:
            del self._missing[active.id]
            if await self._core.dispatch.known_attempt(active.group, active.id) == active.attempt:
                why = "a worker took it from the queue and never reported"
                await self._losses.requeue(active, why)
            else:  # a conductor died before it could queue it
                await self._queue_again([active])
            return
        dead = self._deaths.is_dead(active.group, active.worker)
        what = "it stopped renewing its lease"
        await self._losses.handle(active, death_confirmed=dead, what=what)

    # -- stops -------------------------------------------------------------------------------------------------
    async def _look_at_stops(self) -> None:
        now = self._core.clock()
        for execution_id, since in list(self._stops.items()):
            if now - since < STOP_ACKNOWLEDGEMENT:
                continue
            del self._stops[execution_id]
            seconds = STOP_ACKNOWLEDGEMENT.total_seconds()
            text = f"the worker has not confirmed the stop within {seconds:.0f} s; it may be out of reach"
            await self._core.tell(execution_id, text, kind=EventKind.warning)

    # -- Redis without its data --------------------------------------------------------------------------------
    async def _look_for_emptied_redis(self) -> None:
        """Redis came back without its data: what waited is queued again; what ran is claimed by its agents.

        The records remember which Redis a shard was served from, so this is seen also by a conductor that was not
        there when it happened.
        """
        core = self._core
        epoch = await self._epoch()
        behind = {s for s in self._shards.held if core.epochs.get(s) != epoch}
        if not behind:
            return
        served_before = {s for s in behind if core.epochs.get(s) is not None}
        mine = [a for a in core.memory.all() if a.shard in served_before]
        if mine:
            text = "this Redis is not the one of before; reconciling %d executions"
            log.warning(text, len(mine), extra={"action": "reconcile"})
        waiting = iter([a for a in mine if a.status is ExecutionStatus.queued])
        while part := list(islice(waiting, QUEUED_AT_ONCE)):
            await self._queue_again(part)
        await core.write(lambda conn: ledger.set_epoch(conn, behind, epoch))
        core.epochs.update(dict.fromkeys(behind, epoch))

    async def _epoch(self) -> str:
        core, key = self._core, self._core.keys.epoch()
        redis = core.dispatch.redis
        while True:
            epoch = await redis.get(key)
            if epoch is not None:
                return str(epoch)
            await core.load_functions()  # also when nothing waits: agents need them to renew
            await redis.set(key, secrets.token_hex(8), nx=True)

    async def _queue_again(self, actives: Sequence[Active]) -> None:
        """Puts executions whose queue entries are gone back, same attempt."""
        core = self._core

        def entries(writing: Writing) -> list[QueueEntry]:
            known = [writing.find(active.id) for active in actives]
            return [
                QueueEntry(
                    job=job_of(writing.details(active.id), active),
                    priority=active.priority,
                    front=active.front,
                )
                for active in known
                if active is not None and active.status is ExecutionStatus.queued
            ]

        async with core.admission:
            again = await core.transact(entries)
            ranks = await core.dispatch.enqueue(*again)
        outbox = Outbox()
        for entry, ahead in zip(again, ranks, strict=True):
            if ahead is not None:
                job = entry.job
                event = queued_event(job.group, ahead, job.attempt, core.clock())
                outbox.tell(job.execution_id, event)
        await core.deliver(outbox)
