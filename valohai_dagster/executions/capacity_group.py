"""Looks after the machines of one worker group: reads the load, has it reconciled in a thread, and does what follows.

One conductor at a time does so for a group, see `capacity_watch`; should two for a moment, the records and the launches'
tokens keep them from doing anything twice.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import datetime, timedelta

import sqlalchemy as sa

from valohai_agent.protocol import Command, Worker
from valohai_dagster.capacity.book import Book, Overtaken
from valohai_dagster.capacity.bootstrap.releases import Release, is_outdated
from valohai_dagster.capacity.clouds.base import Driver
from valohai_dagster.capacity.look import Load, Outcome
from valohai_dagster.capacity.machines import MachineRecords
from valohai_dagster.capacity.model import ActionKind, MachineState
from valohai_dagster.capacity.overrides import effective
from valohai_dagster.capacity.policy import policy_of
from valohai_dagster.capacity.reconcile import Reconciler
from valohai_dagster.capacity.standing import state_of
from valohai_dagster.errors import ValohaiError
from valohai_dagster.executions.capacity_load import Running, Seats, Updates, fingerprint
from valohai_dagster.executions.capacity_state import STATE_SECONDS, CapacityState
from valohai_dagster.executions.capacity_tools import Tools
from valohai_dagster.executions.core import ServiceCore, is_outage
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.own_thread import OwnThread
from valohai_dagster.executions.stream import ExecutionStatus
from valohai_dagster.records import tables as t
from valohai_dagster.settings_groups import CloudGroupSettings

log = logging.getLogger(__name__)

ROSTER_SECONDS = 1.0  # between two looks at who has checked in, and at the queue
LOOK_SECONDS = (
    5.0  # at most between two looks at the cloud while there are machines or something waits
)
QUIET_SECONDS = 30.0  # likewise while there is nothing
SOON_SECONDS = 1.0  # after something was done, to see what came of it
_UNFINISHED = [status.value for status in ExecutionStatus if not status.final]


class GroupCapacity:
    """`run` until cancelled, then `close`. `kick` from the event loop at any time."""

    def __init__(
        self,
        core: ServiceCore,
        name: str,
        settings: CloudGroupSettings,
        tools: Tools,
        may_act: Callable[[], bool],
    ) -> None:
        """`settings` as the file has them. `may_act`: whether the group is surely ours at this moment."""
        self.name = name
        self.state: CapacityState | None = None  # as of the last look
        self._core, self._file, self._tools, self._may_act = core, settings, tools, may_act
        self._book = self._make_book(settings)
        self._seats, self._updates = Seats(), Updates()
        self._update: str | None = None  # worker that is to make way for a newer agent
        self._news = asyncio.Event()
        self._retry = False
        self._seen: tuple[object, ...] = ()
        self._watched_since: datetime | None = None  # without a break
        self._next = 0.0  # by the loop's clock
        self._opened: tuple[CloudGroupSettings, Driver, Reconciler] | None = None
        self._thread = OwnThread(f"capacity-{name}")

    def kick(self, *, retry: bool = False) -> None:
        """Something has happened: look at once, or once more when a look is under way. `retry`: and forget all holds."""
        self._retry = self._retry or retry
        self._news.set()

    async def run(self) -> None:
        while True:
            self._news.clear()
            await self._core.patiently(self.look, "capacity")
            await self._core.patiently(self._until_something, "capacity")

    def close(self) -> None:
        """Waits for nothing: a cloud may hang."""
        self._thread.submit(self._close_driver)
        self._thread.shutdown()

    # -- when --------------------------------------------------------------------------------------------------
    async def _until_something(self) -> None:
        loop = asyncio.get_running_loop()
        while (left := self._next - loop.time()) > 0:
            try:
                await asyncio.wait_for(self._news.wait(), min(left, ROSTER_SECONDS))
            except asyncio.TimeoutError:
                waiting, workers = await self._read()
                if fingerprint(waiting, workers) != self._seen:
                    return
            else:
                return

    def _plan_next(self, outcome: Outcome, state: CapacityState) -> None:
        now = self._core.clock()
        something = state.starting or state.up or state.stopped or self._seen[:1] != (0,)
        pause = LOOK_SECONDS if something else QUIET_SECONDS
        if outcome.decisions:
            pause = SOON_SECONDS
        if outcome.next_look is not None:
            pause = min(pause, max(SOON_SECONDS, (outcome.next_look - now).total_seconds()))
        self._next = asyncio.get_running_loop().time() + pause

    # -- a look ------------------------------------------------------------------------------------------------
    async def look(self) -> None:
        """One look at everything, and what has to be done."""
        waiting, workers = await self._read()
        self._seen = fingerprint(waiting, workers)
        if not self._may_act():
            self._watched_since = None
            self._next = asyncio.get_running_loop().time() + ROSTER_SECONDS
            return
        self._loop = loop = asyncio.get_running_loop()
        outcome, state = await loop.run_in_executor(self._thread, self._step, waiting, workers)
        self._plan_next(outcome, state)
        self.state = state
        try:
            await self._follow_up(outcome)
            await self._core.dispatch.redis.set(
                self._core.keys.capacity(self.name), state.model_dump_json(), ex=STATE_SECONDS
            )
        except Exception:
            if self._opened is not None:
                self._opened[2].not_told()
            raise

    async def _read(self) -> tuple[dict[int, int], list[Worker]]:
        dispatch = self._core.dispatch
        try:
            waiting = await dispatch.waiting_by_priority(self.name)
            workers = list((await dispatch.workers(self.name)).values())
        except Exception:
            self._watched_since = None  # who is not heard in an outage is not silent
            raise
        self._watched_since = self._watched_since or self._core.clock()
        return waiting, workers

    def _step(
        self, waiting: Mapping[int, int], workers: Collection[Worker]
    ) -> tuple[Outcome, CapacityState]:
        """In the group's thread. What is wrong is part of the outcome, except for an outage of the records."""
        settings = self._file
        try:
            with self._core.records.read() as conn:
                settings = effective(conn, self.name, self._file)
                release = self._tools.release(conn, settings)
                running = _running(conn, self.name)
            load = self._load(release, waiting, workers, running)
            outcome = self._reconcile(settings, release, load)
        except Overtaken:
            known = self.state.trouble if self.state else None
            outcome = Outcome(trouble=known, next_look=self._core.clock())
        except ValohaiError as error:
            outcome = Outcome(trouble=str(error))
        except Exception as error:
            if is_outage(error):
                raise
            extra = {"action": "fail", "group": self.name}
            log.exception("looking after the machines of %s failed", self.name, extra=extra)
            text = f"a defect of the execution service: {error!r}; its log has the details"
            outcome = Outcome(trouble=text)
        return outcome, self._state(outcome, settings, workers)

    def _load(
        self,
        release: Release | None,
        waiting: Mapping[int, int],
        workers: Collection[Worker],
        running: Collection[Running],
    ) -> Load:
        now = self._core.clock()
        version = release.version if release is not None else None
        outdated = {one.name for one in workers if is_outdated(one.version, version)}
        if version is not None:
            self._update = self._updates.next(workers, version, now, outdated=outdated)
        return Load(
            waiting=waiting,
            seats=self._seats.look(workers, now, outdated=outdated, running=running),
            watched_since=self._watched_since or now,
        )

    def _reconcile(
        self, settings: CloudGroupSettings, release: Release | None, load: Load
    ) -> Outcome:
        policy = policy_of(settings, bootstrap=release.version if release is not None else None)
        # A machine out of reach is not taken before its executions were given up.
        grace = timedelta(seconds=self._core.settings.lost_grace_seconds)
        policy = replace(policy, silence=max(policy.silence, grace))
        reconciler = self._reconciler(settings)
        if self._retry:
            self._retry = False
            reconciler.retry_now()
        return reconciler.step(load, policy)

    def _reconciler(self, settings: CloudGroupSettings) -> Reconciler:
        """Made anew when settings have changed: a driver has its own idea of them."""
        if self._opened is None or self._opened[0] != settings:
            self._close_driver()
            self._book = self._make_book(settings)
            driver = self._tools.open_driver(self.name, settings)
            reconciler = Reconciler(
                self.name,
                driver,
                self._book,
                prepare=self._tools.prepare(self.name, settings),
                clock=self._core.clock,
                make_token=lambda: secrets.token_hex(8),
                seal=self._seal,
            )
            self._opened = (settings, driver, reconciler)
        return self._opened[2]

    def _seal(self, machine_id: str) -> bool:
        """In the group's thread. A worker that is silent may still be at its work."""
        with self._core.records.read() as conn:
            if _running(conn, self.name, machine_id):
                return False
        sealing = self._core.dispatch.seal(self.name, machine_id)
        return asyncio.run_coroutine_threadsafe(sealing, self._loop).result(timeout=10)

    def _make_book(self, settings: CloudGroupSettings) -> Book:
        return MachineRecords(
            self._core.records,
            self.name,
            kind=getattr(settings, "kind", ""),
            price_per_hour=settings.price_per_hour,
            spot_price_per_hour=settings.spot_price_per_hour,
            slots=settings.slots * settings.agents,
            clock=self._core.clock,
        )

    def _close_driver(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def _state(
        self, outcome: Outcome, settings: CloudGroupSettings, workers: Collection[Worker]
    ) -> CapacityState:
        known = self._book.machines()
        busy: dict[str, int] = defaultdict(int)
        for worker in workers:
            busy[worker.machine_id] += worker.busy
        alive = [
            one
            for one in known
            if one.machine.state in (MachineState.starting, MachineState.running)
            and one.missing_since is None
        ]
        listed = [one.machine.token for one in known]
        asked = [
            (intent.at, max(0, intent.count - listed.count(intent.token)))
            for intent in self._book.intents()
            if intent.action is ActionKind.launch
        ]
        booting = [(one.machine.created_at, 1) for one in alive if one.registered_at is None]
        coming = [(since, count) for since, count in [*asked, *booting] if count]
        return CapacityState(
            at=self._core.clock(),
            summary=outcome.summary,
            trouble=outcome.trouble,
            starting=sum(count for _, count in coming),
            starting_since=min((since for since, _ in coming), default=None),
            up=sum(one.registered_at is not None for one in alive),
            stopped=sum(one.machine.state is MachineState.stopped for one in known),
            states=Counter(state_of(one, busy.get(one.machine.id)) for one in known),
            max_machines=settings.max_machines,
            enabled=settings.enabled,
            looked_after_by=self._tools.name,
        )

    # -- what follows ------------------------------------------------------------------------------------------
    async def _follow_up(self, outcome: Outcome) -> None:
        for text in outcome.decisions:
            extra = {"action": "plan", "group": self.name}
            log.info("group %s: %s", self.name, text, extra=extra)
        commands = [
            (self.name, worker, Command(kind="drain", reason=reason))
            for worker, reason in outcome.drain.items()
        ]
        if self._update is not None:
            command = Command(kind="update", reason="another version of the agent is published")
            commands.append((self.name, self._update, command))
            self._update = None
        if commands:
            await self._core.deliver(Outbox(commands=commands))
        for machine_id, what in outcome.dead.items():
            await self._bury(machine_id, what)

    async def _bury(self, machine_id: str, what: str) -> None:
        """The machine is surely gone, so are the workers on it."""
        workers = self._seats.workers_on(machine_id)
        running = await self._core.read(lambda conn: _running(conn, self.name, machine_id))
        workers |= {one.worker for one in running}
        for worker in sorted(workers):
            await self._tools.on_gone(self.name, worker, f"machine {machine_id} is gone: {what}")
        self._seats.forget(machine_id)


def _running(conn: sa.Connection, group: str, machine_id: str | None = None) -> list[Running]:
    """What workers have to do, on the machine or anywhere."""
    e, a = t.executions.c, t.attempts.c
    query = (
        sa.select(a.worker, a.machine_id, a.leased_at)
        .join(t.executions, sa.and_(e.id == a.execution_id, e.attempt == a.number))
        .where(
            e.group_name == group,
            e.status.in_(_UNFINISHED),
            a.machine_id.is_not(None) if machine_id is None else a.machine_id == machine_id,
            a.worker.is_not(None),
            a.ended_at.is_(None),
        )
    )
    rows = conn.execute(query)
    return [Running(worker=worker, machine_id=at, since=since) for worker, at, since in rows]
