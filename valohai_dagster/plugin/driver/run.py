"""One run: its plan is followed step by step, and its end is written."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, EventLogEntry

from valohai_dagster.errors import ConfigurationError
from valohai_dagster.executions.service import ExecutionService
from valohai_dagster.executions.stream import ExecutionView
from valohai_dagster.plugin.compat.engine import (
    DagsterEvent,
    ErrorSource,
    ExecutionStep,
    RetryMode,
    serializable_error,
)
from valohai_dagster.plugin.driver.events import RunEvents, StepEvents
from valohai_dagster.plugin.driver.facts import JobFacts, StepFacts, facts_of
from valohai_dagster.plugin.driver.handover import HandOver
from valohai_dagster.plugin.driver.instances import Instances
from valohai_dagster.plugin.driver.lanes import InstanceGone, LaneClosed, Lanes
from valohai_dagster.plugin.driver.mailbox import Mailbox
from valohai_dagster.plugin.driver.plan import Limits, Plan, limits_of
from valohai_dagster.plugin.driver.platform import Platform
from valohai_dagster.plugin.driver.pools import Pools
from valohai_dagster.plugin.driver.recovery import Past, identity, read_past
from valohai_dagster.plugin.driver.step import StepTry
from valohai_dagster.plugin.launching import config_with_defaults
from valohai_dagster.plugin.partitions import RunPartitions

log = logging.getLogger(__name__)
T = TypeVar("T")

LAUNCH_SECONDS = (
    10.0  # a launcher writes RUN_START within this time of the hand-over, or it is dead
)
LOOK_SECONDS = 0.2
POOL_SECONDS = (
    15.0  # between two claims of a step that waits for a pool, without a hint that it may succeed
)


class Driver(Protocol):
    """The driver, as far as its runs use it."""

    @property
    def service(self) -> ExecutionService: ...

    @property
    def platform(self) -> Platform: ...

    @property
    def lanes(self) -> Lanes: ...

    @property
    def pools(self) -> Pools: ...

    @property
    def instances(self) -> Instances: ...

    def open_mailbox(self, execution_id: str) -> Mailbox: ...

    def close_mailbox(self, execution_id: str) -> None: ...

    def log_links(self, instance: DagsterInstance, view: ExecutionView) -> Mapping[str, str]: ...

    async def stop_executions(self, run_id: str, reason: str) -> None: ...

    async def patiently(self, call: Callable[[], Awaitable[T]]) -> T: ...


class RunDrive:
    """`drive()` ends when the run has ended, or raises `LaneClosed` when somebody else must go on."""

    def __init__(
        self,
        driver: Driver,
        handover: HandOver,
        *,
        handed_over_at: datetime,
        resumed: bool,
    ) -> None:
        self._driver = driver
        self._handed_over_at = handed_over_at
        self.handover = handover
        self._instance: DagsterInstance | None = None
        self.run_id = handover.run_id
        self.instance_id = handover.instance_id
        self.shard = driver.service.shards.of(self.run_id)
        self.resumed = resumed  # another process may have driven it before
        self.loaded = False
        self.terminating = False
        self.ending = False  # its end is being written
        self.deleted = False
        self._tries: dict[str, tuple[StepTry, asyncio.Task[DagsterEvent]]] = {}
        self._failed: list[DagsterEvent] = []
        self._requests: set[str] = set()  # to terminate
        self._wake = asyncio.Event()

    # -- what steps ask for -------------------------------------------------------------------------------------------
    @property
    def service(self) -> ExecutionService:
        return self._driver.service

    @property
    def platform(self) -> Platform:
        return self._driver.platform

    @property
    def instance(self) -> DagsterInstance:
        assert self._instance is not None
        return self._instance

    @property
    def run_config(self) -> Mapping[str, Any]:
        return self.dagster_run.run_config

    @property
    def resolved_config(self) -> Mapping[str, Any]:
        return self._resolved_config

    @property
    def job_name(self) -> str:
        return self.dagster_run.job_name

    @property
    def retry_mode(self) -> RetryMode:
        return self._limits.retries

    def partitions(self, facts: StepFacts) -> RunPartitions:
        return self.handover.partitions_of(facts.tag.asset_key)

    def partition_keys(self, facts: StepFacts) -> Sequence[str]:
        """As Dagster knows them, for materializations."""
        return self.handover.partition_keys(facts.tag.asset_key)

    def parent_partitions(self, facts: StepFacts) -> Mapping[str, Sequence[str]]:
        return self.handover.parent_partitions(facts.tag.asset_key)

    def log_links(self, view: ExecutionView) -> Mapping[str, str]:
        return self._driver.log_links(self.instance, view)

    def open_mailbox(self, execution_id: str) -> Mailbox:
        return self._driver.open_mailbox(execution_id)

    def close_mailbox(self, execution_id: str) -> None:
        self._driver.close_mailbox(execution_id)

    def may_write(self) -> bool:
        return self._driver.service.shards.may_write(self.shard)

    async def call(self, call: Callable[[], T]) -> T:
        """Runs something that blocks, in the run's lane."""
        return await self._driver.lanes.run(self.run_id, call, self._instance)

    async def patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        return await self._driver.patiently(call)

    async def write(self, entries: Sequence[EventLogEntry]) -> None:
        if self.deleted:
            return
        await self._driver.lanes.write(self.instance, self.run_id, entries, self.may_write)

    # -- the course of the run ----------------------------------------------------------------------------------------
    async def drive(self) -> None:
        try:
            if await self._load():
                await self._follow_plan()
                await self._end()
        except (LaneClosed, InstanceGone, ConfigurationError):
            raise
        except Exception as error:
            log.exception("run %s cannot be driven on", self.run_id, extra={"action": "fail"})
            await self._break(error)
        finally:
            for _, task in self._tries.values():
                task.cancel()
            if self.loaded and not self._plan.complete and self._facts.has_pools:
                await self._forget_claims()

    async def _load(self) -> bool:
        """Reads the run and what has been done for it; False when there is nothing left to do."""
        self._instance = await self.call(lambda: self._driver.instances.get(self.instance_id))
        found = await self.call(lambda: self.instance.get_run_by_id(self.run_id))
        if found is None or found.is_finished:
            await self._stop_leftovers("was deleted" if found is None else "had ended already")
            await self._free_all_slots()
            return False
        self.dagster_run: DagsterRun = found
        self._events = RunEvents(found.job_name, self.run_id)
        self._facts: JobFacts = await self.call(lambda: facts_of(self.instance, self.dagster_run))
        self._resolved_config = config_with_defaults(self._facts.job, self.run_config)
        self._limits: Limits = limits_of(self._resolved_config)
        self._plan = Plan(self._facts, self._limits)
        past = await self._past()
        found = await self.call(lambda: self.instance.get_run_by_id(self.run_id)) or found
        if found.status is DagsterRunStatus.CANCELING:
            self.terminating = True
        elif not past.started:  # never over a status that says more
            await self.write(self._events.start())
        self._failed = past.failures
        self._past_of_steps = past
        begun = self._plan.resume(past) if past.step_events or past.begun else []
        pools = self._facts.has_pools
        self._plan.limit(self.instance, self.dagster_run, pools=False)
        if pools:
            await self.call(lambda: self._plan.limit(self.instance, self.dagster_run, pools=True))
            held = [(pool, s.key) for s in begun if (pool := self._facts.steps[s.key].pool)]
            await self.call(lambda: self._plan.claim_again(held))
        for step in begun:
            self._begin(step)
        self.loaded = True
        return True

    async def _past(self) -> Past:
        """The launcher hands over first and writes RUN_START next; it may have died in between."""
        past = await self._read_past()
        while not past.started and self._handed_over_for() < timedelta(seconds=LAUNCH_SECONDS):
            await asyncio.sleep(LOOK_SECONDS)
            past = await self._read_past()
        return past

    async def _read_past(self) -> Past:
        return await self.call(lambda: read_past(self.instance, self.run_id))

    def _handed_over_for(self) -> timedelta:
        return self._driver.service.clock() - self._handed_over_at

    async def _follow_plan(self) -> None:
        plan = self._plan
        while not plan.complete:
            passed_over = not self.terminating
            while passed_over:  # what is skipped may make others ready
                await self._begin_steps()
                passed_over = await self._pass_over_steps()
            if plan.complete or (self.terminating and not self._tries):
                return
            await self._wait()
            await self._collect()

    async def _begin_steps(self) -> None:
        for step in await self._maybe_blocking(self._plan.next_steps):
            self._begin(step)
        for key, initial in self._plan.blocked():
            facts = self._facts.steps[key]
            events = StepEvents(self.job_name, self.run_id, facts.step, facts.output_types)
            await self.write(events.pool_blocked(facts.pool or "", initial=initial))
        self._driver.pools.expect(self, self._waiting_pools())

    def _waiting_pools(self) -> set[str]:
        return {self._facts.steps[key].pool or "" for key in self._plan.waits_for_pool}

    async def _maybe_blocking(self, call: Callable[[], T]) -> T:
        return await self.call(call) if self._facts.has_pools else call()

    def _begin(self, step: ExecutionStep) -> None:
        past, key = self._past_of_steps, step.key
        attempt = StepTry(
            self,
            self._facts.steps[key],
            previous_attempts=self._plan.previous_attempts(key),
            written=past.written.pop(key, set()),
            started_at=past.start_times.pop(key, None),
        )
        task = asyncio.create_task(attempt.drive(), name=f"step {key} of run {self.run_id}")
        task.add_done_callback(lambda _: self._wake.set())
        self._tries[key] = (attempt, task)

    async def _pass_over_steps(self) -> bool:
        """Skips and abandons what the steps before decide, until there is no more of it; False if there was none."""
        any_of_it = False
        while skips := self._plan.skips():
            any_of_it = True
            for step, missing in skips:
                await self._write_new(self._step_events(step).skipped(missing), step.key)
        while abandons := self._plan.abandons():
            any_of_it = True
            for step, failed, abandoned in abandons:
                entries = self._step_events(step).abandoned(failed, abandoned)
                await self._write_new(entries, step.key)
        return any_of_it

    def _step_events(self, step: ExecutionStep) -> StepEvents:
        return StepEvents(self.job_name, self.run_id, step, {})

    async def _write_new(self, entries: Sequence[EventLogEntry], step_key: str) -> None:
        past = self._past_of_steps
        written = past.written.get(step_key, set())
        await self.write(
            [e for e in entries if identity(e) not in written and e.user_message not in past.lines]
        )

    async def _wait(self) -> None:
        """Until a step ends, somebody wakes the run, or a retry is due."""
        times = [t for t in (self._plan.seconds_to_retry(), self._pool_timeout()) if t is not None]
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wake.wait(), min(times) if times else None)
        self._wake.clear()

    def _pool_timeout(self) -> float | None:
        return POOL_SECONDS if self._plan.waits_for_pool else None

    async def _collect(self) -> None:
        for key, (attempt, task) in list(self._tries.items()):
            if not task.done():
                continue
            del self._tries[key]
            event = task.result()
            if event.is_step_failure:
                self._failed.append(event)
            for output in self._outputs_of(key, attempt):
                self._plan.handle(output)
            await self._maybe_blocking(lambda event=event: self._plan.handle(event))

    def _outputs_of(self, step_key: str, attempt: StepTry) -> list[DagsterEvent]:
        """STEP_OUTPUT events of a try that has ended. A blocking check may have failed it after its outputs."""
        facts = self._facts.steps[step_key]
        events = StepEvents(self.job_name, self.run_id, facts.step, facts.output_types)
        entries = [entry for name in attempt.outputs for entry in events.output(name, {})]
        return [entry.dagster_event for entry in entries if entry.dagster_event]

    async def terminate(self, request: str | None = None) -> None:
        """K-54, L-20: stops what runs; nothing new begins; the run ends as canceled.

        A second request is a hard stop. Requests have ids, since one may be delivered twice; None means that somebody
        saw the run being cancelled.
        """
        if request is not None:
            self._requests.add(request)
        hard = len(self._requests) > 1
        if self.terminating and not hard:
            return
        self.terminating = True
        for attempt, task in list(self._tries.values()):
            if not task.done():
                await self.patiently(lambda attempt=attempt: attempt.stop(hard=hard))
        self._wake.set()

    def wake(self) -> None:
        self._wake.set()

    # -- the end of the run -------------------------------------------------------------------------------------------
    async def _end(self) -> None:
        """A terminal event is written on an unfinished run only (DAGSTER_NOTES 7)."""
        self.ending = True
        run = await self.call(lambda: self.instance.get_run_by_id(self.run_id))
        if self._facts.has_pools:
            await self._free_slots()
        if run is None:
            return
        if run.is_finished:
            text = f"The executions of this run have ended; it had been marked {run.status.value} before."
            await self.write(self._events.engine(text))
        elif not self._plan.complete or (
            self._failed and (self.terminating or run.status is DagsterRunStatus.CANCELING)
        ):
            interrupted = not self._plan.complete or any(map(_is_interrupt, self._failed))
            await self.write(self._events.canceled(self._failed, interrupted=interrupted))
        elif self._failed:
            await self.write(self._events.failure(self._failed))
        else:
            await self.write(self._events.success())

    async def _free_slots(self) -> None:
        """DAGSTER_NOTES 4: whatever the run still holds."""
        await self.call(self._plan.close)
        await self._free_all_slots()

    async def _free_all_slots(self) -> None:
        storage = self.instance.event_log_storage
        if storage.supports_global_concurrency_limits:
            await self.call(lambda: storage.free_concurrency_slots_for_run(self.run_id))

    async def _forget_claims(self) -> None:
        if not self.may_write():
            return  # they may be those of the conductor that goes on
        try:
            await self.call(self._plan.close)
        except (LaneClosed, InstanceGone):
            return  # the process that goes on claims anew

    async def _stop_leftovers(self, why: str) -> None:
        reason = f"Dagster run {self.run_id} {why}"
        await self.patiently(lambda: self._driver.stop_executions(self.run_id, reason))

    async def abandon(self) -> None:
        """The run was deleted: its executions stop, nothing more is written, and the run ends with them."""
        self.ending = self.deleted = True
        await self.terminate()

    async def _break(self, error: Exception) -> None:
        """A defect, or a snapshot that is gone: the run fails with the reason, its executions stop."""
        await self._stop_leftovers("cannot be driven on")
        run = await self.call(lambda: self.instance.get_run_by_id(self.run_id))
        if run is not None and not run.is_finished:
            events = RunEvents(run.job_name, self.run_id)
            await self.write(events.broken(serializable_error(error)))
        await self._free_all_slots()


def _is_interrupt(failure: DagsterEvent) -> bool:
    return failure.step_failure_data.error_source is ErrorSource.INTERRUPT
