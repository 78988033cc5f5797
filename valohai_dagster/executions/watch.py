"""Watches over executions that nobody reports on: lost leases, lost queue entries, stops without an answer."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa

from valohai_agent.protocol import Keys
from valohai_dagster.executions import ledger
from valohai_dagster.executions.dispatch import Dispatch
from valohai_dagster.executions.lifecycle import (
    STOP_ACKNOWLEDGEMENT,
    Loss,
    LossStep,
    judge_loss,
)
from valohai_dagster.executions.salvage import from_files, from_live, store_salvaged
from valohai_dagster.executions.stream import EventKind, ExecutionStatus
from valohai_dagster.executions.waiting import why_it_waits
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import Stores

log = logging.getLogger(__name__)
T = TypeVar("T")

LONG_WAIT = timedelta(seconds=15)  # in the queue, before the reason is told
MISSING_TICKS = 3  # looks in a row that found an execution neither queued nor leased


class Supervisor(Protocol):
    """What a group on this host knows of its agents."""

    def is_dead(self, worker: str) -> bool: ...

    def attempt_logs(self, execution_id: str, attempt: int) -> Path: ...


class Watched(Protocol):
    """The service, as far as the watch uses it."""

    settings: Settings
    stores: Stores
    keys: Keys
    dispatch: Dispatch
    active: dict[str, ledger.Active]
    clock: Callable[[], datetime]

    @property
    def groups(self) -> Mapping[str, Supervisor]: ...

    async def read(self, query: Callable[[sa.Connection], T]) -> T: ...

    async def write(self, change: Callable[[sa.Connection], T]) -> T: ...

    async def remember(self, execution_id: str) -> ledger.Active | None: ...

    async def tell(
        self, execution_id: str, text: str, *, kind: EventKind = ..., **data: Any
    ) -> None: ...

    async def finish(self, execution_id: str, status: ExecutionStatus, reason: str) -> None: ...

    async def requeue(self, execution_id: str, why: str) -> None: ...

    async def queue_again(self, execution_id: str) -> None: ...

    async def load_functions(self) -> None: ...


class LeaseWatch:
    """Part of the service; `tick()` about once a second."""

    def __init__(self, service: Watched) -> None:
        self._service = service
        self._stops: dict[str, datetime] = {}  # forwarded, not acknowledged yet
        self._missing: dict[str, int] = {}
        self._losing: set[str] = set()
        self._waiting: dict[str, tuple[datetime, str | None]] = {}  # since when, and what was said

    def expect_acknowledgement(self, execution_id: str) -> None:
        self._stops.setdefault(execution_id, self._service.clock())

    def acknowledged(self, execution_id: str) -> None:
        self._stops.pop(execution_id, None)

    async def tick(self) -> None:
        await self._look_for_emptied_redis()
        await self._look_at_leases()
        await self._look_at_stops()
        await self._look_at_waiting()

    async def worker_gone(self, worker: str, what: str) -> None:
        for execution_id in list(self._service.active):
            active = self._service.active.get(
                execution_id
            )  # anew: handling the one before took time
            if active is not None and active.worker == worker:
                await self._service.dispatch.drop_lease(active.group, active.id)
                await self._lost(active, death_confirmed=True, what=what)

    async def _look_at_leases(self) -> None:
        service = self._service
        actives = [a for a in service.active.values() if a.status is not ExecutionStatus.created]
        where = await service.dispatch.where((a.group, a.id) for a in actives)
        for active in actives:
            waits, leased = where[active.id]
            if waits or leased:
                self._missing.pop(active.id, None)
                if leased and active.suspected_at is not None:
                    await self._back(active)
                continue
            # A lease vanishes for a moment between an agent's report and its application: look again first.
            self._missing[active.id] = self._missing.get(active.id, 0) + 1
            if self._missing[active.id] >= MISSING_TICKS and active.id in service.active:
                await self._missing_for_good(service.active[active.id])

    async def _missing_for_good(self, active: ledger.Active) -> None:
        if active.worker is None:
            await self._requeue(active, "a worker took it from the queue and never reported")
            return
        group = self._service.groups.get(active.group)
        dead = group is not None and group.is_dead(active.worker)
        await self._lost(active, death_confirmed=dead, what="it stopped renewing its lease")

    async def _lost(self, active: ledger.Active, *, death_confirmed: bool, what: str) -> None:
        """A loss that is being handled, or was by the time it is told here, is not handled again."""
        current = self._service.active.get(active.id)
        if active.id in self._losing or current is None or current.attempt != active.attempt:
            return
        self._losing.add(active.id)
        try:
            await self._handle_loss(active, death_confirmed=death_confirmed, what=what)
        finally:
            self._losing.discard(active.id)

    async def _handle_loss(
        self, active: ledger.Active, *, death_confirmed: bool, what: str
    ) -> None:
        service = self._service
        now = service.clock()
        loss = Loss(
            suspected_at=active.suspected_at,
            death_confirmed=death_confirmed,
            stop_requested=active.stop_requested > 0,
            attempt=active.attempt,
        )
        grace = timedelta(seconds=service.settings.lost_grace_seconds)
        limit = service.settings.max_infrastructure_attempts
        step = judge_loss(loss, now, grace=grace, max_attempts=limit)
        why = f"worker {active.worker} was lost: {what}"
        if step is LossStep.suspect:
            await self._suspect(active, now)
        elif step is LossStep.requeue:
            await self._requeue(active, why)
        elif step is LossStep.stopped:
            await self._end_attempt(active, why)
            await service.finish(active.id, ExecutionStatus.stopped, f"stopped; {why}")
        elif step is LossStep.give_up:
            await self._end_attempt(active, why)
            await service.finish(
                active.id, ExecutionStatus.crashed, await self._history(active, why)
            )

    async def _suspect(self, active: ledger.Active, now: datetime) -> None:
        service = self._service
        await service.write(
            lambda conn: ledger.update_attempt(conn, active.id, active.attempt, suspected_at=now)
        )
        await service.remember(active.id)
        text = (
            f"no sign of life from worker {active.worker}; it may still be computing, "
            f"another attempt starts in {service.settings.lost_grace_seconds:.0f} s if it stays silent"
        )
        await service.tell(active.id, text, kind=EventKind.warning)

    async def _back(self, active: ledger.Active) -> None:
        service = self._service
        await service.write(
            lambda conn: ledger.update_attempt(conn, active.id, active.attempt, suspected_at=None)
        )
        await service.remember(active.id)
        await service.tell(active.id, f"worker {active.worker} is back, the attempt goes on")

    async def _requeue(self, active: ledger.Active, why: str) -> None:
        await self._end_attempt(active, why)
        await self._service.requeue(active.id, why)

    async def _end_attempt(self, active: ledger.Active, why: str) -> None:
        """Closes the lost attempt; what its log says is kept."""
        service = self._service
        self._missing.pop(active.id, None)
        logs = await self._salvage(active)
        values = {"ended_at": service.clock(), "end": "lost", "reason": why, "logs": logs}
        await service.write(
            lambda conn: ledger.update_attempt(conn, active.id, active.attempt, **values)
        )

    async def _salvage(self, active: ledger.Active) -> dict[str, Any]:
        """The dead agent's own files if it ran on this host, else what arrived of its live log."""
        service = self._service
        local = service.groups.get(active.group)
        left = local.attempt_logs(active.id, active.attempt) if local else None
        files = await asyncio.to_thread(from_files, left) if left else {}
        complete = bool(files)
        if not files:
            live = service.keys.log(active.group, active.id, active.attempt)
            entries: Any = await service.dispatch.redis.xrange(live)
            files = from_live(entries)
        row = await service.read(lambda conn: ledger.row_of(conn, active.id))
        prefix = f"logs/{row.project_id}/{active.id}/{active.attempt}"
        store = service.stores[service.settings.log_store_name]
        return await asyncio.to_thread(store_salvaged, files, store, prefix, complete=complete)

    async def _history(self, active: ledger.Active, why: str) -> str:
        attempts = await self._service.read(lambda conn: ledger.attempt_reasons(conn, active.id))
        lines = "; ".join(f"attempt {number}: {reason}" for number, reason in attempts)
        return f"lost {active.attempt} times: {lines or why}"

    async def _look_at_stops(self) -> None:
        now = self._service.clock()
        for execution_id, since in list(self._stops.items()):
            if now - since < STOP_ACKNOWLEDGEMENT:
                continue
            del self._stops[execution_id]
            seconds = STOP_ACKNOWLEDGEMENT.total_seconds()
            text = f"the worker has not confirmed the stop within {seconds:.0f} s; it may be out of reach"
            await self._service.tell(execution_id, text, kind=EventKind.warning)

    async def _look_at_waiting(self) -> None:
        """Who waits for long is told why, and again when the reason changes."""
        service = self._service
        now = service.clock()
        queued = [a for a in service.active.values() if a.status is ExecutionStatus.queued]
        self._waiting = {a.id: self._waiting.get(a.id, (now, None)) for a in queued}
        long = [a for a in queued if now - self._waiting[a.id][0] >= LONG_WAIT]
        for group in sorted({active.group for active in long}):
            workers = (await service.dispatch.workers(group)).values()
            explain = functools.partial(why_it_waits, group, workers, local=group in service.groups)
            reason = explain(ahead=0)
            for active in long:
                since, said = self._waiting[active.id]
                if active.group != group or reason == said:
                    continue
                ahead = await service.dispatch.position(group, active.id) or 0
                await service.tell(active.id, explain(ahead=ahead), kind=EventKind.warning)
                self._waiting[active.id] = (since, reason)

    async def _look_for_emptied_redis(self) -> None:
        """Redis came back without its data: what waited is queued again; what ran is claimed by its agents."""
        service = self._service
        epoch = service.keys.epoch()
        if await service.dispatch.redis.exists(epoch):
            return
        await service.load_functions()  # also when nothing waits: agents need them to renew
        if not await service.dispatch.redis.set(epoch, "1", nx=True):
            return
        waiting = [a for a in service.active.values() if a.status is ExecutionStatus.queued]
        if service.active:
            log.warning("Redis is empty; reconciling %d executions", len(service.active))
        for active in waiting:
            await service.queue_again(active.id)
