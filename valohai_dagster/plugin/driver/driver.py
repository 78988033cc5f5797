"""Takes the runs of this conductor's shards, drives each in a task of its own, and watches over them.

A hand-over is a row of `vh_runs`; the Redis stream only tells that there is one. So a lost message, an emptied Redis or a
killed conductor delay a run, they do not lose it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import redis
import sqlalchemy as sa
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter
from pydantic import ValidationError

from valohai_dagster.errors import ConfigurationError
from valohai_dagster.executions.core import cancel_all, is_outage, run_all
from valohai_dagster.executions.service import ExecutionService
from valohai_dagster.executions.stream import ExecutionView, FollowEvent
from valohai_dagster.plugin.compat.engine import (
    NOT_FINISHED_STATUSES,
)
from valohai_dagster.plugin.compute_logs import ValohaiComputeLogManager
from valohai_dagster.plugin.driver import handed_over
from valohai_dagster.plugin.driver.handover import HandOver
from valohai_dagster.plugin.driver.instances import Instances
from valohai_dagster.plugin.driver.lanes import InstanceGone, LaneClosed, Lanes
from valohai_dagster.plugin.driver.mailbox import Mailbox
from valohai_dagster.plugin.driver.platform import Platform
from valohai_dagster.plugin.driver.pools import Pools
from valohai_dagster.plugin.driver.run import LAUNCH_SECONDS, RunDrive
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import Stores

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_DRIVEN = 20_000  # runs at once; more stay in the table until others end
READ_COUNT = 200
READ_BLOCK_MS = 2_000
STATUS_SECONDS = 5.0  # between two looks whether runs were deleted or cancelled elsewhere
SWEEP_SECONDS = 30.0  # between two looks for hand-overs whose message was lost
STATUS_CHUNK = 500
OUTAGE_SECONDS = 0.5


class RunDriver:
    """`run()` until cancelled, beside the execution service on the same event loop."""

    def __init__(
        self, settings: Settings, service: ExecutionService, records: Records, stores: Stores
    ) -> None:
        self.service = service
        self.settings = settings
        self.lanes = Lanes()
        self.pools = Pools(self.lanes)
        self.instances = Instances(records, settings)
        self.platform = Platform(settings, records, stores)
        self._runs: dict[str, tuple[RunDrive, asyncio.Task[None]]] = {}
        self._mailboxes: dict[str, Mailbox] = {}
        self._ready: set[int] = set()  # shards whose earlier runs are taken up
        service.listen(self._heard)
        service.shards.on_taken(self._take)
        service.shards.on_lost(self._lose)

    @property
    def busy(self) -> bool:
        return bool(self._runs)

    @property
    def driven(self) -> int:
        return len(self._runs)

    async def run(self) -> None:
        for shard in self.service.shards.held - self._ready:
            await self._take(shard)
        await run_all(
            self._forever(self._read),
            self._forever(self._look_at_statuses),
            self._forever(self._sweep),
            self.pools.watch(),
        )

    async def close(self) -> None:
        """Leaves the runs to the next conductor; what is being written is finished first."""
        await cancel_all(task for _, task in self._runs.values())
        await asyncio.to_thread(self.lanes.close)
        self.instances.close()

    # -- for runs -----------------------------------------------------------------------------------------------------
    def open_mailbox(self, execution_id: str) -> Mailbox:
        mailbox = self._mailboxes[execution_id] = Mailbox()
        return mailbox

    def close_mailbox(self, execution_id: str) -> None:
        self._mailboxes.pop(execution_id, None)

    def _heard(self, execution_id: str, events: list[FollowEvent]) -> None:
        mailbox = self._mailboxes.get(execution_id)
        if mailbox is not None:
            mailbox.put(events)

    def log_links(self, instance: DagsterInstance, view: ExecutionView) -> Mapping[str, str]:
        """Addresses of the finished log, for instances whose log manager is not ours."""
        if isinstance(instance.compute_log_manager, ValohaiComputeLogManager):
            return {}
        base = f"{self.settings.base_url}/log/{view.id}/{view.attempt}"
        return {"stdout": f"{base}/stdout", "stderr": f"{base}/stderr"}

    async def stop_executions(self, run_id: str, reason: str) -> None:
        """Stops whatever a run that is gone has left behind."""
        c = t.executions.c
        query = sa.select(c.id).where(c.run_id == run_id, c.ended_at.is_(None))
        ids = await self.service.read(lambda conn: list(conn.execute(query).scalars()))
        for execution_id in ids:
            await self.service.stop(execution_id, hard=False, reason=reason)

    async def patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """The call's result; repeated while Redis or the records are away."""
        while True:
            try:
                return await call()
            except Exception as error:
                if not is_outage(error):
                    raise
                log.warning("a run waits: %s", error, extra={"action": "outage", "step": "run"})
                await asyncio.sleep(OUTAGE_SECONDS)

    # -- taking runs --------------------------------------------------------------------------------------------------
    async def _take(self, shard: int) -> None:
        """Goes on with the runs of a shard that is ours from now on."""
        ids = await self.patiently(
            lambda: self.service.read(lambda conn: handed_over.driving(conn, [shard]))
        )
        if ids:
            log.info("going on with %d runs of shard %d", len(ids), shard, extra={"action": "take"})
        await self._adopt(ids, resumed=True)
        self._ready.add(shard)

    async def _lose(self, shard: int) -> None:
        """Lets go of the shard's runs once what is being written of them is written."""
        self._ready.discard(shard)
        await cancel_all(task for run, task in self._runs.values() if run.shard == shard)
        await self.lanes.flush()

    async def _read(self) -> None:
        """New hand-overs and requests, as they come."""
        shards = self._ready & self.service.shards.held
        if not shards or len(self._runs) >= MAX_DRIVEN:
            await asyncio.sleep(OUTAGE_SECONDS)
            return
        streams: dict[Any, Any] = {self.service.keys.runs(shard): "0-0" for shard in shards}
        reply: Any = await self.service.dispatch.redis.xread(
            streams, count=READ_COUNT, block=READ_BLOCK_MS
        )
        for stream, entries in reply or []:
            await self._handle([fields for _, fields in entries])
            await self.service.dispatch.redis.xdel(stream, *(entry_id for entry_id, _ in entries))

    async def _handle(self, messages: list[Mapping[str, str]]) -> None:
        ids = [m["run_id"] for m in messages if m.get("run_id") not in self._runs]
        await self._adopt(ids, resumed=False)
        for message in messages:
            if message.get("kind") == "terminate" and message.get("run_id") in self._runs:
                run, _ = self._runs[message["run_id"]]
                await run.terminate(message.get("request"))

    async def _sweep(self) -> None:
        """Hand-overs that nobody told us of: Redis was away or was emptied."""
        await asyncio.sleep(SWEEP_SECONDS)
        shards = sorted(self._ready & self.service.shards.held)
        before = self.service.clock() - timedelta(seconds=2 * LAUNCH_SECONDS)
        ids = await self.service.read(lambda conn: handed_over.driving(conn, shards, before=before))
        await self._adopt([i for i in ids if i not in self._runs], resumed=True)

    async def _adopt(self, run_ids: Iterable[str], *, resumed: bool) -> None:
        wanted = list(dict.fromkeys(run_ids))[: max(0, MAX_DRIVEN - len(self._runs))]
        if not wanted:
            return
        rows = await self.patiently(
            lambda: self.service.read(lambda conn: handed_over.find(conn, wanted))
        )
        for row in rows:
            if row.state == handed_over.RunState.driving.value and row.run_id not in self._runs:
                await self._begin(row, resumed)

    async def _begin(self, row: Any, resumed: bool) -> None:
        try:
            handover = HandOver.model_validate(row.handover)
        except ValidationError as error:
            text = f"this release cannot read its hand-over ({error.error_count()} problems); was a newer one here?"
            log.error("run %s: %s", row.run_id, text, extra={"action": "refuse"})
            await self.patiently(lambda: self._close(row.run_id, text))
            return
        run = RunDrive(self, handover, handed_over_at=row.ctime, resumed=resumed)
        task = asyncio.create_task(self._drive(run), name=f"run {row.run_id}")
        self._runs[row.run_id] = (run, task)

    async def _drive(self, run: RunDrive) -> None:
        try:
            await run.drive()
        except LaneClosed:
            return
        except InstanceGone as error:
            text = f"its Dagster instance is gone ({error}); its executions go on and keep their outputs"
            log.warning("run %s: %s", run.run_id, text, extra={"action": "gone"})
            await self.patiently(lambda: self._close(run.run_id, text))
        except ConfigurationError as error:
            log.error("run %s cannot be driven: %s", run.run_id, error, extra={"action": "fail"})
            return
        else:
            await self.patiently(lambda: self._close(run.run_id))
        finally:
            self._runs.pop(run.run_id, None)
            self.pools.forget(run)

    async def _close(self, run_id: str, reason: str = "") -> None:
        now = self.service.clock()
        await self.service.write(
            lambda conn: handed_over.close(conn, run_id, now=now, reason=reason)
        )

    # -- watching over runs -------------------------------------------------------------------------------------------
    async def _look_at_statuses(self) -> None:
        """Runs that were deleted, cancelled or ended by somebody else, and a terminate whose message was lost."""
        await asyncio.sleep(STATUS_SECONDS)
        by_instance: dict[int, list[RunDrive]] = {}
        for run, _ in self._runs.values():
            if run.loaded:
                by_instance.setdefault(id(run.instance), []).append(run)
        for runs in by_instance.values():
            for start in range(0, len(runs), STATUS_CHUNK):
                await self._look_at(runs[start : start + STATUS_CHUNK])

    async def _look_at(self, runs: list[RunDrive]) -> None:
        ids = [run.run_id for run in runs]
        instance = runs[0].instance
        try:
            going, canceling = await self.lanes.run(
                ids[0], lambda: _statuses(instance, ids), instance
            )
        except InstanceGone:
            return  # its runs notice by themselves
        for run in runs:
            if run.run_id in canceling:
                await run.terminate()
            elif run.run_id not in going and run.run_id in self._runs:
                await self._look_closely(run)

    async def _look_closely(self, run: RunDrive) -> None:
        if run.ending:
            return
        found = await run.call(lambda: run.instance.get_run_by_id(run.run_id))
        if found is None:
            log.info("run %s was deleted", run.run_id, extra={"action": "deleted"})
            await run.abandon()
        elif found.is_finished and not run.ending:
            await run.terminate()

    async def _forever(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except LaneClosed:
                return
            except Exception as error:
                if is_outage(error) or isinstance(error, redis.ResponseError):
                    log.warning("%s waits: %s", step.__name__, error, extra={"action": "outage"})
                else:  # of one run or instance; the others must go on
                    log.exception("%s failed", step.__name__, extra={"action": "fail"})
                await asyncio.sleep(OUTAGE_SECONDS)


def _statuses(instance: DagsterInstance, run_ids: list[str]) -> tuple[set[str], set[str]]:
    """Which of the runs have not ended, and which of them are being cancelled."""
    storage = instance.run_storage
    going = storage.get_run_ids(RunsFilter(run_ids=run_ids, statuses=NOT_FINISHED_STATUSES))
    canceling = storage.get_run_ids(
        RunsFilter(run_ids=run_ids, statuses=[DagsterRunStatus.CANCELING])
    )
    return set(going), set(canceling)
