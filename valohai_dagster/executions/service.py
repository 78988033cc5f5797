"""The execution service: it alone owns submissions, reports, grants, leases, the local groups and their records.

One asyncio process; any number of them share the executions by shards. Whatever happens is first written to the
records and only then told or acted on, so after a `kill -9` at any point another one goes on from the records, Redis
and the agents: streams are read from their start, applied entries are deleted, and entries that were applied but not
deleted are recognised and replayed without effect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

import redis.asyncio as aioredis

from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.clouds.registry import OpenDriver
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.executions import ledger
from valohai_dagster.executions.admission import Admission
from valohai_dagster.executions.capacity_tools import make_tools
from valohai_dagster.executions.capacity_watch import CapacityWatch
from valohai_dagster.executions.core import OUTAGES, ServiceCore, is_outage, run_all
from valohai_dagster.executions.deaths import Deaths
from valohai_dagster.executions.grants import GrantPlanner
from valohai_dagster.executions.identity import Identity
from valohai_dagster.executions.intake import Intake
from valohai_dagster.executions.late_logs import LateLogs
from valohai_dagster.executions.local_groups import LocalGroups
from valohai_dagster.executions.losses import Losses
from valohai_dagster.executions.machine_users import MachineUsers
from valohai_dagster.executions.minting import Minting
from valohai_dagster.executions.packaging import Packager
from valohai_dagster.executions.registries.logins import RegistryLogins
from valohai_dagster.executions.reports import Reports
from valohai_dagster.executions.restarts import Restarts
from valohai_dagster.executions.seat import Seat
from valohai_dagster.executions.shards import Shards
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.executions.stops import Stops
from valohai_dagster.executions.stream import ExecutionView
from valohai_dagster.executions.supervision import Supervision
from valohai_dagster.executions.surveys import Surveys
from valohai_dagster.executions.sweeping import Sweeper
from valohai_dagster.executions.watch import LeaseWatch
from valohai_dagster.executions.writing import ShardLost
from valohai_dagster.records.engine import Records
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import Stores

__all__ = ["OUTAGES", "ExecutionService"]

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
LEAVE_SECONDS = 8.0  # how long an orderly end may take; then others wait for the end of our leases


class ExecutionService(ServiceCore):
    """`run()` until cancelled or drained; several coroutines of one event loop.

    For the same process: `submit`, `submit_again`, `stop`, `view`, `listen` and `shards`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        records: Records,
        broker: aioredis.Redis,
        broker_url: str,
        stores: Stores,
        secret_key: SecretKey,
        clock: Callable[[], datetime] = utcnow,
        drivers: OpenDriver | None = None,
    ) -> None:
        """`drivers` opens the drivers of groups of clouds instead of `registry.open_driver`."""
        super().__init__(
            settings,
            records=records,
            broker=broker,
            broker_url=broker_url,
            stores=stores,
            clock=clock,
        )
        identity = Identity.of(settings.state_dir)
        self.shards = Shards(self, identity)
        logins = RegistryLogins(settings.registries, clock=clock)
        self._minting = Minting(self, self.shards, secret_key, logins.login_for)
        planner = GrantPlanner(settings, stores, secret_key, busy=self._minting.is_busy)
        self.groups = LocalGroups(self, broker_url, self.worker_gone)
        self._seat = Seat(broker, self.keys, identity)
        self._supervision = Supervision(self, self.groups, self._seat)
        self._deaths = Deaths(self, lambda dead: self._watch.workers_gone(dead))
        tools = make_tools(
            self,
            name=identity.name,
            secret_key=secret_key,
            on_gone=self.worker_gone,
            redis_url=broker_url,
            drivers=drivers,
        )
        self.capacity = CapacityWatch(self, identity, tools)
        self._machine_users = MachineUsers(self, secret_key)
        restarts = Restarts(self, planner)
        self._losses = Losses(self, self.groups, restarts)
        self._watch = LeaseWatch(self, self.shards, self._losses, self)
        self._stops = Stops(self)
        self._reports = Reports(self, self.shards, planner, self._minting, restarts)
        admission = Admission(
            settings, records=records, stores=stores, planner=planner, secret_key=secret_key
        )
        self.surveys = Surveys(self, self.shards, admission)
        self._intake = Intake(self, self.shards, admission, self._stops, self.surveys)
        self.sweeper = Sweeper(self, self.shards, secret_key)
        self.packager = Packager(self)
        self.late_logs = LateLogs(self, self.shards, self.groups)
        self._serving: asyncio.Future[None] | None = None
        self._leaving: asyncio.Future[None] | None = None

    # -- life of the service -----------------------------------------------------------------------------------
    async def run(self) -> None:
        """Serves until drained or cancelled; an outage of Redis or the database makes it wait, not end.

        Cancelled, it finishes what it has in hand and hands its shards over before it ends.
        """
        self._serving = asyncio.ensure_future(
            run_all(
                self._forever(self.shards.keep),
                self._forever(self.shards.balance),
                self._forever(self._intake.read),
                self._forever(self._intake.take),
                self._forever(self._reports.read),
                self._forever(self._deaths.read),
                self._forever(self._tick),
                self._forever(self._supervision.step),
                self._forever(self.sweeper.step),
                self._forever(self.late_logs.step),
                self._forever(self.packager.step),
                self.patiently(self.capacity.look_behind, "capacity"),
                *map(self._forever, self.capacity.steps),
                *([self._forever(self._machine_users.step)] if self._machine_users.needed else ()),
            )
        )
        try:
            await asyncio.wait({self._serving})
            if not self._serving.cancelled():
                self._serving.result()
        finally:
            self.groups.close()
            await _certainly(self.surveys.leave())
            await _certainly(self.drain())
            self.capacity.close()
            self._minting.close()
            self.sweeper.close()
            self.packager.close()
            self.close()

    async def drain(self) -> None:
        """Finishes what is in hand and hands everything over, so that another conductor goes on at once.

        `run` ends then.
        """
        if self._leaving is None:
            self._leaving = asyncio.ensure_future(self._leave())
        await asyncio.shield(self._leaving)

    async def _leave(self) -> None:
        try:
            await asyncio.wait_for(self._hand_over(), LEAVE_SECONDS)
        except (aioredis.RedisError, *OUTAGES, asyncio.TimeoutError) as error:
            # A Redis that came back empty has no functions yet, and no leases either.
            if isinstance(error, aioredis.RedisError) and not is_outage(error):
                raise
            text = "the shards could not be handed over, their leases end by themselves: %r"
            log.warning(text, error, extra={"action": "leave"})
        finally:
            if self._serving is not None:
                self._serving.cancel()
                await asyncio.wait({self._serving})

    async def _hand_over(self) -> None:
        await self.shards.release_all()
        await self._seat.leave()
        await self.capacity.leave()

    @property
    def working(self) -> bool:
        """Whether there are executions that have not ended."""
        return bool(self.memory.active)

    def idle_for(self) -> timedelta:
        """How long there has been nothing to do."""
        if self.memory.active or self.groups.any_alive() or self.capacity.busy:
            self.last_work = self.clock()
        return self.clock() - self.last_work

    async def _forever(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await self.patiently(step, step.__name__)
            except ShardLost as error:
                await self.patiently(lambda shard=error.shard: self.shards.lose(shard), "losing")

    async def _tick(self) -> None:
        await self._watch.tick()
        await self.surveys.look()
        await asyncio.sleep(TICK_SECONDS)

    # -- for the same process ----------------------------------------------------------------------------------
    async def submit(self, spec: ExecutionSpec) -> ExecutionView:
        """Creates the execution or joins it again, and tells how it stands; a refused one has ended with `error`.

        Raises `ShardLost` when the execution is new and its shard is another conductor's.
        """
        return await self._intake.submit(spec)

    async def submit_again(self, execution_id: str) -> ExecutionView | None:
        """The same for an execution that the records have; None if they do not."""
        row = await self.patiently(
            lambda: self.read(lambda conn: ledger.row_of(conn, execution_id)), "submitting"
        )
        return None if row is None else await self.submit(ledger.spec_of(row))

    async def stop(self, execution_id: str, *, hard: bool, reason: str) -> None:
        """K-54, L-20: idempotent; a second request is a hard stop. Each hop is told to the followers."""
        await self._stops.stop(execution_id, hard=hard, reason=reason)

    # -- deaths ------------------------------------------------------------------------------------------------
    async def worker_gone(self, group: str, worker: str, what: str) -> None:
        """A supervisor saw the worker die: its leases are over at once, whoever looks after its executions."""
        self._deaths.note(group, worker)

        async def step() -> None:
            await self._watch.workers_gone({(group, worker): what})
            await self._deaths.announce(group, worker, what)
            await self._supervision.look()

        await self.patiently(step, "worker_gone")

    def is_dead(self, group: str, worker: str) -> bool:
        """Whether the worker is surely dead; False also for one that nobody knows."""
        return self._deaths.is_known(group, worker) or (
            group in self.groups and self.groups[group].is_dead(worker)
        )

    def is_local(self, group: str) -> bool:
        """Whether conductors start the group's agents themselves."""
        return group in self.groups


async def _certainly(work: Awaitable[None]) -> None:
    """Waits for the end of the work however often it is cancelled meanwhile."""
    task, cancelled = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError
