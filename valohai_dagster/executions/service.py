"""The execution service: it alone owns submissions, reports, grants, leases, the local groups and their records.

One asyncio process. Whatever happens is first written to the records and only then told or acted on, so after a
`kill -9` at any point a new service goes on from the records, Redis and the agents: streams are read from their
start, applied entries are deleted, and entries that were applied but not deleted are recognised and replayed
without effect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

import redis
import redis.asyncio as aioredis
import sqlalchemy as sa
from pydantic import ValidationError

from valohai_agent import protocol as p
from valohai_dagster.broker.connection import load_functions, make_client
from valohai_dagster.capacity.clouds.local import LocalGroup
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.errors import ValohaiError
from valohai_dagster.executions import ledger
from valohai_dagster.executions.dispatch import Dispatch
from valohai_dagster.executions.effects import Cause, apply_report
from valohai_dagster.executions.grants import GrantMinter, job_of, seal
from valohai_dagster.executions.lifecycle import Standing, Verdict, judge_report, status_after_stop
from valohai_dagster.executions.preparation import choose_group, prepare
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, FollowEvent
from valohai_dagster.executions.submissions import Submission
from valohai_dagster.executions.views import view_of
from valohai_dagster.executions.watch import LeaseWatch
from valohai_dagster.records.engine import Records
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import Stores

log = logging.getLogger(__name__)
T = TypeVar("T")

READ_BLOCK_MS = 2_000
READ_COUNT = 100
TICK_SECONDS = 1.0
OUTAGE_PAUSE_SECONDS = 0.5
LIVE_LOG_SECONDS = (
    3600  # how long a live log is kept after its end; the stored one is kept for good
)
SERVICE_TTL_SECONDS = 15


def utcnow() -> datetime:
    return datetime.now(timezone.utc)


class ExecutionService:
    """`run()` until `stop()`; several coroutines, one database thread, so records change in one order."""

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
    ) -> None:
        self.settings = settings
        self.records = records
        self.stores = stores
        self.secret_key = secret_key
        self.clock = clock
        self.keys = p.Keys(records.deployment_id)
        self.dispatch = Dispatch(broker, self.keys)
        self.minter = GrantMinter(settings, stores, secret_key)
        self.active: dict[str, ledger.Active] = {}
        self.groups = self._local_groups(broker_url)
        self.watch = LeaseWatch(self)
        self.last_work = clock()
        self._broker_url = broker_url
        self._database = ThreadPoolExecutor(max_workers=1, thread_name_prefix="records")
        self._tasks: list[asyncio.Task[None]] = []

    # -- life of the service ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves until cancelled; an outage of Redis or the database makes it wait, not end."""
        await self._patiently(self._recover, "recover")
        loops = [self._read_submissions, self._read_reports, self._tick]
        self._tasks = [asyncio.create_task(self._forever(loop)) for loop in loops]
        try:
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._database.shutdown(wait=True)

    async def stop_agents(self, timeout: float) -> None:
        await asyncio.gather(*(group.drain_all(timeout) for group in self.groups.values()))

    def idle_for(self) -> timedelta:
        """How long there has been nothing to do."""
        if self.active or any(group.alive() for group in self.groups.values()):
            self.last_work = self.clock()
        return self.clock() - self.last_work

    def _local_groups(self, broker_url: str) -> dict[str, LocalGroup]:
        return {
            name: LocalGroup(
                name,
                group,
                state_dir=self.settings.state_dir,
                redis_url=broker_url,
                deployment=self.records.deployment_id,
                on_gone=self.worker_gone,
                drain=lambda worker, reason, name=name: self._drain(name, worker, reason),
                clock=self.clock,
            )
            for name, group in self.settings.groups.items()
            if group.kind == "local"
        }

    async def _recover(self) -> None:
        """Takes up where the last service stopped."""
        actives = await self.read(ledger.unfinished)
        self.active = {active.id: active for active in actives}
        for active in actives:
            if active.status is ExecutionStatus.created:
                await self._prepare_and_queue(active.id)
        if actives:
            log.info(
                "going on with %d unfinished executions", len(actives), extra={"action": "recover"}
            )

    async def _forever(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._patiently(step, step.__name__)

    async def _patiently(self, step: Callable[[], Awaitable[None]], name: str) -> None:
        """Runs a step; what it could not finish because a server is away is tried again later."""
        while True:
            try:
                return await step()
            except redis.ResponseError as error:
                if "unction not found" not in str(error):
                    raise
                await asyncio.to_thread(load_functions, make_client(self._broker_url))
            except (redis.ConnectionError, redis.TimeoutError, sa.exc.OperationalError) as error:
                log.warning("%s waits: %s", name, error, extra={"action": "outage", "step": name})
                await asyncio.sleep(OUTAGE_PAUSE_SECONDS)

    async def read(self, query: Callable[[sa.Connection], T]) -> T:
        def call() -> T:
            with self.records.read() as conn:
                return query(conn)

        return await asyncio.get_running_loop().run_in_executor(self._database, call)

    async def write(self, change: Callable[[sa.Connection], T]) -> T:
        def call() -> T:
            with self.records.write() as conn:
                return change(conn)

        return await asyncio.get_running_loop().run_in_executor(self._database, call)

    # -- submissions -----------------------------------------------------------------------------------------

    async def _read_submissions(self) -> None:
        stream = self.keys.submissions()
        reply: Any = await self.dispatch.redis.xread(
            {stream: "0-0"}, count=READ_COUNT, block=READ_BLOCK_MS
        )
        for entry_id, fields in reply[0][1] if reply else []:
            self.last_work = self.clock()
            try:
                await self._submitted(Submission.model_validate_json(fields["s"]))
            except (ValidationError, KeyError) as error:
                log.error(
                    "dropped a submission that cannot be read: %s", error, extra={"action": "drop"}
                )
            await self.dispatch.redis.xdel(stream, entry_id)

    async def _submitted(self, submission: Submission) -> None:
        if submission.kind == "stop":
            await self.stop(submission.execution_id, hard=submission.hard, reason=submission.reason)
        elif submission.spec is not None:
            await self._execute(submission.spec)

    async def _execute(self, spec: ExecutionSpec) -> None:
        known = await self.read(lambda conn: ledger.row_of(conn, spec.execution_id) is not None)
        if not known:
            await self.write(
                lambda conn: ledger.create_execution(
                    conn, spec, group=self.settings.default_group, now=self.clock()
                )
            )
            await self._prepare_and_queue(spec.execution_id)
        await self.snapshot(spec.execution_id)

    async def _prepare_and_queue(self, execution_id: str) -> None:
        """created -> queued, or refused with everything that is wrong."""

        def change(conn: sa.Connection) -> p.Job | str:
            row = ledger.row_of(conn, execution_id)
            spec = ExecutionSpec.model_validate(row.spec)
            try:
                group, notices = choose_group(spec, self.settings)
                prepared = prepare(
                    conn,
                    spec,
                    row,
                    group=group,
                    notices=notices,
                    settings=self.settings,
                    stores=self.stores,
                    secret_key=self.secret_key,
                )
            except ValohaiError as error:
                refusal = {
                    "status": ExecutionStatus.error.value,
                    "reason": str(error),
                    "ended_at": self.clock(),
                }
                ledger.update(conn, execution_id, **refusal)
                return str(error)
            ledger.update(conn, execution_id, group_name=group)
            ledger.record_job(
                conn, prepared.job, self.minter.seal_sources(prepared.sources), self.clock()
            )
            return prepared.job

        job = await self.write(change)
        await self.remember(execution_id)
        if isinstance(job, str):
            log.info(
                "refused %s: %s",
                execution_id,
                job,
                extra={"action": "refuse", "execution": execution_id},
            )
            return
        await self.enqueue(job, priority=self.active[execution_id].priority)

    async def enqueue(
        self, job: p.Job, *, priority: int, front: bool = False, force: bool = False
    ) -> None:
        """Queues the job, says where it stands, and lets capacity know at once."""
        await self.dispatch.enqueue(job, priority=priority, front=front, force=force)
        ahead = await self.dispatch.position(job.group, job.execution_id) or 0
        text = f"queued in {job.group}" + (f" behind {ahead}" if ahead else "")
        await self.tell(job.execution_id, text, status=ExecutionStatus.queued.value, ahead=ahead)
        await self.reconcile(job.group)

    async def queue_again(self, execution_id: str) -> None:
        """Puts an execution whose queue entry is gone back, same attempt."""
        row = await self.read(lambda conn: ledger.row_of(conn, execution_id))
        await self.enqueue(job_of(row, row.attempt), priority=row.priority, front=row.attempt > 1)

    async def remember(self, execution_id: str) -> ledger.Active | None:
        """Brings the memory in line with the records; ended executions are forgotten."""
        active = await self.read(lambda conn: ledger.active_of(conn, execution_id))
        if active is None or active.status.final:
            self.active.pop(execution_id, None)
        else:
            self.active[execution_id] = active
        return active

    # -- stop ------------------------------------------------------------------------------------------------

    async def stop(self, execution_id: str, *, hard: bool, reason: str) -> None:
        """K-54, L-20: idempotent; a second request is a hard stop. Each hop is told to the followers."""
        active = await self.remember(execution_id)
        if active is None:
            log.warning("stop of unknown execution %s", execution_id, extra={"action": "stop"})
            return
        if active.status.final:
            return await self.snapshot(execution_id)
        hard = hard or active.stop_requested > 0
        status = status_after_stop(active.status, hard=hard)
        level = 2 if hard else 1
        waiting = active.token is None and await self.dispatch.withdraw(active.group, execution_id)
        if waiting:
            return await self.finish(
                execution_id, ExecutionStatus.stopped, reason or "stopped before it started"
            )
        await self.write(
            lambda conn: ledger.update(
                conn, execution_id, status=status.value, stop_requested=level
            )
        )
        await self.remember(execution_id)
        word = "hard stop" if hard else "stop"
        await self.tell(
            execution_id, f"{word} requested{': ' + reason if reason else ''}", status=status.value
        )
        await self._forward_stop(execution_id)

    async def _forward_stop(self, execution_id: str) -> None:
        active = self.active.get(execution_id)
        if (
            active is None
            or active.worker is None
            or active.token is None
            or not active.stop_requested
        ):
            return
        kind = "stop-hard" if active.stop_requested > 1 else "stop"
        command = p.Command(kind=kind, execution_id=execution_id, token=active.token)
        await self.dispatch.command(active.group, active.worker, command)
        self.watch.expect_acknowledgement(execution_id)
        await self.tell(execution_id, f"{kind} sent to worker {active.worker}")

    # -- reports ---------------------------------------------------------------------------------------------

    async def _read_reports(self) -> None:
        streams: dict[Any, Any] = {
            self.keys.reports(group): "0-0" for group in self.settings.groups
        }
        reply: Any = await self.dispatch.redis.xread(streams, count=READ_COUNT, block=READ_BLOCK_MS)
        for stream, entries in reply or []:
            group = next(g for g in self.settings.groups if self.keys.reports(g) == stream)
            for entry_id, fields in entries:
                self.last_work = self.clock()
                report = _parse_report(fields)
                if report is not None:
                    await self._reported(group, report)
                await self.dispatch.redis.xdel(stream, entry_id)

    async def _reported(self, group: str, report: p.Report) -> None:
        active = self.active.get(report.execution_id) or await self.remember(report.execution_id)
        if active is None or active.group != group:
            return await self._fence(group, report, "no such execution in this group")
        lease = await self.dispatch.lease(group, active.id) if active.token is None else {}
        standing = Standing(
            status=active.status,
            attempt=active.attempt,
            token=active.token,
            last_seq=active.last_seq,
        )
        verdict = judge_report(
            standing,
            attempt=report.attempt,
            token=report.token,
            seq=report.seq,
            lease_token=lease.get("token"),
        )
        if verdict is Verdict.fence:
            return await self._fence(group, report, "its lease is over")
        if verdict is Verdict.drop:
            return
        events: list[FollowEvent] = []
        if verdict is Verdict.apply:
            cause_now = self.clock()

            def change(conn: sa.Connection) -> list[FollowEvent]:
                cause = Cause(
                    conn=conn,
                    active=active,
                    report=report,
                    now=cause_now,
                    datum_url=self.settings.datum_url,
                )
                return apply_report(cause)

            events = await self.write(change)
            await self.remember(active.id)
        if events:
            await self.dispatch.publish(active.id, events)
        await self._answer(report)

    async def _answer(self, report: p.Report) -> None:
        """What follows outside the records; repeated when a report is replayed."""
        body, execution_id = report.body, report.execution_id
        if isinstance(body, p.Leased):
            await self._grant(report, None)
            await self._forward_stop(execution_id)
        elif isinstance(body, p.GrantsWanted):
            await self._grant(report, body.requests[: p.MAX_GRANT_REQUESTS])
        elif isinstance(body, p.StopAcknowledged):
            self.watch.acknowledged(execution_id)
        elif isinstance(body, p.Finished):
            await self._ended(execution_id)

    async def _grant(self, report: p.Report, requests: list[p.GrantRequest] | None) -> None:
        active = self.active.get(report.execution_id)
        lease = await self.dispatch.lease(active.group, active.id) if active else {}
        if active is None or lease.get("token") != report.token:
            return  # the lease is gone: a renewed one asks again

        def mint(conn: sa.Connection) -> p.Grants:
            row = ledger.row_of(conn, active.id)
            if requests is None:
                return self.minter.initial(conn, row)
            return self.minter.requested(conn, row, report.attempt, requests, self.clock())

        grants = await self.write(mint)
        await self.dispatch.push_grants(active.group, active.id, seal(grants, lease["public_key"]))

    async def _fence(self, group: str, report: p.Report, why: str) -> None:
        if isinstance(report.body, (p.LostLease, p.Finished)):
            return  # it has stopped already
        log.info(
            "fencing %s: %s",
            report.worker,
            why,
            extra={"action": "fence", "execution": report.execution_id},
        )
        command = p.Command(
            kind="fence", execution_id=report.execution_id, token=report.token, reason=why
        )
        await self.dispatch.command(group, report.worker, command)

    # -- ends ------------------------------------------------------------------------------------------------

    async def finish(self, execution_id: str, status: ExecutionStatus, reason: str) -> None:
        """Ends an execution that no agent will report on any more."""
        values = {"status": status.value, "reason": reason, "ended_at": self.clock()}
        await self.write(lambda conn: ledger.update(conn, execution_id, **values))
        await self._ended(execution_id)

    async def _ended(self, execution_id: str) -> None:
        row = await self.read(lambda conn: ledger.row_of(conn, execution_id))
        self.active.pop(execution_id, None)
        self.watch.acknowledged(execution_id)
        await self.snapshot(execution_id)
        await self.dispatch.forget(row.group_name, execution_id, row.attempt, LIVE_LOG_SECONDS)
        await self.reconcile(row.group_name)

    async def snapshot(self, execution_id: str) -> None:
        """Publishes how the execution stands; `final` when it has ended."""
        view = await self.read(
            lambda conn: view_of(conn, execution_id, datum_url=self.settings.datum_url)
        )
        if view is None:
            return
        kind = EventKind.final if view.status.final else EventKind.snapshot
        text = f"{view.status.value}: {view.reason}" if view.reason else view.status.value
        event = FollowEvent(
            kind=kind,
            time=self.clock(),
            attempt=view.attempt,
            message=text,
            data=view.model_dump(mode="json"),
        )
        await self.dispatch.publish(execution_id, [event])

    async def tell(
        self, execution_id: str, text: str, *, kind: EventKind = EventKind.state, **data: Any
    ) -> None:
        active = self.active.get(execution_id)
        attempt = active.attempt if active else 1
        log.info(
            "%s: %s", execution_id, text, extra={"action": kind.value, "execution": execution_id}
        )
        event = FollowEvent(kind=kind, time=self.clock(), attempt=attempt, message=text, data=data)
        await self.dispatch.publish(execution_id, [event])

    # -- capacity and losses ---------------------------------------------------------------------------------

    async def _tick(self) -> None:
        await self.watch.tick()
        for group in self.groups:
            await self.reconcile(group)
        await asyncio.sleep(TICK_SECONDS)

    async def reconcile(self, group: str) -> None:
        local = self.groups.get(group)
        if local is not None:
            await local.reconcile(
                await self.dispatch.waiting(group), await self.dispatch.workers(group)
            )

    async def worker_gone(self, worker: str, what: str) -> None:
        """A supervisor saw the worker die: its leases are over at once."""

        async def step() -> None:
            await self.watch.worker_gone(worker, what)
            for group in self.groups:
                await self.reconcile(group)

        await self._patiently(step, "worker_gone")

    async def _drain(self, group: str, worker: str, reason: str) -> None:
        await self.dispatch.command(group, worker, p.Command(kind="drain", reason=reason))

    async def requeue(self, execution_id: str, why: str) -> None:
        """Another attempt after an infrastructure loss, ahead of everything that waits."""
        active = self.active[execution_id]
        number = active.attempt + 1

        def change(conn: sa.Connection) -> p.Job:
            ledger.start_attempt(conn, execution_id, number)
            return job_of(ledger.row_of(conn, execution_id), number)

        job = await self.write(change)
        await self.remember(execution_id)
        await self.tell(execution_id, f"starting attempt {number}: {why}")
        await self.enqueue(job, priority=active.priority, front=True, force=True)


def _parse_report(fields: Mapping[str, str]) -> p.Report | None:
    """None for what this version cannot read: a newer agent's unknown report kind, or garbage."""
    try:
        report = p.Report.model_validate_json(fields["r"])
    except (ValidationError, KeyError) as error:
        log.warning("dropped a report that cannot be read: %s", error, extra={"action": "drop"})
        return None
    if not p.speaks(report.v):
        log.warning("dropped a report of protocol %d from %s", report.v, report.worker)
        return None
    return report
