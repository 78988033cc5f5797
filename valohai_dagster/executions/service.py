"""The execution service: it alone owns submissions, reports, grants, leases, the local groups and their records.

One asyncio process. Whatever happens is first written to the records and only then told or acted on, so after a
`kill -9` at any point a new service goes on from the records, Redis and the agents: streams are read from their
start, applied entries are deleted, and entries that were applied but not deleted are recognised and replayed
without effect.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any, TypeVar

import redis
import redis.asyncio as aioredis
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from valohai_agent import protocol as p
from valohai_dagster.broker.connection import load_functions, make_client
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.errors import ValohaiError
from valohai_dagster.executions import ledger
from valohai_dagster.executions.conditions import ConditionError, is_met
from valohai_dagster.executions.core import ServiceCore, run_all
from valohai_dagster.executions.effects import Cause, apply_report
from valohai_dagster.executions.grants import GrantMinter, job_of, seal
from valohai_dagster.executions.lifecycle import Standing, Verdict, judge_report, status_after_stop
from valohai_dagster.executions.local_groups import LocalGroups
from valohai_dagster.executions.preparation import choose_group, prepare
from valohai_dagster.executions.seat import Seat
from valohai_dagster.executions.shards import Shards
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView, FollowEvent
from valohai_dagster.executions.submissions import Submission, parse_report, parse_submission
from valohai_dagster.executions.watch import LeaseWatch
from valohai_dagster.records.engine import Records
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import Stores

log = logging.getLogger(__name__)
M = TypeVar("M", Submission, p.Report)

READ_BLOCK_MS = 2_000
READ_COUNT = 100
TICK_SECONDS = 1.0
OUTAGE_PAUSE_SECONDS = 0.5
LIVE_LOG_SECONDS = 3600  # how long a live log outlives its execution; the stored one stays
MAX_FAILURES = 3  # tries to handle one stream entry before it is set aside
OUTAGES = (redis.ConnectionError, redis.TimeoutError, OperationalError)


class ExecutionService(ServiceCore):
    """`run()` until cancelled; several coroutines of one event loop."""

    def __init__(
        self,
        settings: Settings,
        *,
        records: Records,
        broker: aioredis.Redis,
        broker_url: str,
        stores: Stores,
        secret_key: SecretKey,
        clock: Callable[[], datetime] = p.utcnow,
    ) -> None:
        super().__init__(settings, records=records, broker=broker, stores=stores, clock=clock)
        self.secret_key = secret_key
        self.minter = GrantMinter(settings, stores, secret_key)
        self.groups = LocalGroups(self, broker_url, self.worker_gone)
        self.watch = LeaseWatch(self)
        self.seat = Seat(self.dispatch.redis, self.keys, settings)
        self.shards = Shards(records)
        self.last_work = clock()
        self._broker_url = broker_url
        self._failures: Counter[str] = Counter()
        self._warned: set[tuple[str, str]] = set()

    # -- life of the service ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves until cancelled; an outage of Redis or the database makes it wait, not end.

        Raises `SeatLost` when another service has taken over.
        """
        try:
            await run_all(self._begin())
            await run_all(
                self._forever(self._read_submissions),
                self._forever(self._read_reports),
                self._forever(self._tick),
            )
        finally:
            self.close()

    async def _begin(self) -> None:
        await self._patiently(self.seat.take, "take the seat")
        await self._patiently(self._recover, "recover")
        await self.shards.take_all()

    def idle_for(self) -> timedelta:
        """How long there has been nothing to do."""
        if self.active or self.groups.any_alive():
            self.last_work = self.clock()
        return self.clock() - self.last_work

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
                await self.load_functions()
            except OUTAGES as error:
                log.warning("%s waits: %s", name, error, extra={"action": "outage", "step": name})
                await asyncio.sleep(OUTAGE_PAUSE_SECONDS)

    async def load_functions(self) -> None:
        """A Redis that came back empty knows none of them, and agents cannot load them."""
        await asyncio.to_thread(load_functions, make_client(self._broker_url))

    # -- submissions -----------------------------------------------------------------------------------------

    async def _read_submissions(self) -> None:
        streams: dict[Any, Any] = {self.keys.submissions(s): "0-0" for s in self.shards.held}
        reply: Any = await self.dispatch.redis.xread(streams, count=READ_COUNT, block=READ_BLOCK_MS)
        for stream, entries in reply or []:
            for entry_id, fields in entries:
                await self._consume(stream, entry_id, parse_submission(fields), self._submitted)

    async def _consume(
        self, stream: str, entry_id: str, message: M | None, handle: Callable[[M], Awaitable[None]]
    ) -> None:
        """Handles one entry and deletes it; an unreadable one (None) is only deleted.

        One that fails for an unknown reason is tried again, then given up together with its execution: an
        execution that nobody can account for must not wait for ever.
        """
        self.last_work = self.clock()
        try:
            if message is not None:
                await handle(message)
        except (*OUTAGES, redis.ResponseError):
            raise
        except Exception as error:
            self._failures[entry_id] += 1
            log.exception("cannot handle %s of %s", entry_id, stream, extra={"action": "fail"})
            if self._failures[entry_id] < MAX_FAILURES:
                await asyncio.sleep(OUTAGE_PAUSE_SECONDS)
                return await self._consume(stream, entry_id, message, handle)
            if message is not None:
                await self._give_up(message.execution_id, error)
        self._failures.pop(entry_id, None)
        await self.dispatch.redis.xdel(stream, entry_id)
        return None

    async def _give_up(self, execution_id: str, error: Exception) -> None:
        active = await self.remember(execution_id)
        if active is None or active.status.final:
            return
        if active.worker and active.token:
            command = p.Command(kind="fence", execution_id=execution_id, token=active.token)
            await self.dispatch.command(active.group, active.worker, command)
        reason = f"a defect of the execution service: {error!r}; its log has the details"
        await self.finish(execution_id, ExecutionStatus.crashed, reason)

    async def _submitted(self, submission: Submission) -> None:
        if submission.kind == "stop":
            await self.stop(submission.execution_id, hard=submission.hard, reason=submission.reason)
        elif submission.spec is not None:
            await self._execute(submission.spec)

    async def submit(self, spec: ExecutionSpec) -> ExecutionView:
        """Creates the execution or joins it again, and tells how it stands; a refused one has ended with `error`."""
        await self._execute(spec)
        view = await self.view(spec.execution_id)
        assert view is not None
        return view

    async def _execute(self, spec: ExecutionSpec) -> None:
        row = await self.read(lambda conn: ledger.row_of(conn, spec.execution_id))
        if row is None:
            await self.write(
                lambda conn: ledger.create_execution(
                    conn,
                    spec,
                    shard=self.shards.of(spec.run_id or spec.execution_id),
                    group=self.settings.default_group,
                    now=self.clock(),
                )
            )
        elif spec.run_id != row.run_id or spec.retry_number != row.retry_number:
            await self.write(lambda conn: ledger.rejoined(conn, spec))
        if row is None or row.status == ExecutionStatus.created.value:
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
        await self.groups.reconcile(job.group)

    async def queue_again(self, execution_id: str) -> None:
        """Puts an execution whose queue entry is gone back, same attempt."""
        row = await self.read(lambda conn: ledger.row_of(conn, execution_id))
        await self.enqueue(job_of(row, row.attempt), priority=row.priority, front=row.attempt > 1)

    # -- stop ------------------------------------------------------------------------------------------------

    async def stop(self, execution_id: str, *, hard: bool, reason: str) -> None:
        """K-54, L-20: idempotent; a second request is a hard stop. Each hop is told to the followers."""
        active = await self.remember(execution_id)
        if active is None:
            log.warning("stop of unknown execution %s", execution_id, extra={"action": "stop"})
            return
        if active.status.final:
            await self.snapshot(execution_id)
            return
        hard = hard or active.stop_requested > 0
        status = status_after_stop(active.status, hard=hard)
        level = 2 if hard else 1
        waiting = active.token is None and await self.dispatch.withdraw(active.group, execution_id)
        if waiting:
            why = reason or "stopped before it started"
            await self.finish(execution_id, ExecutionStatus.stopped, why)
            return
        await self.write(
            lambda conn: ledger.update(
                conn,
                execution_id,
                status=status.value,
                stop_requested=level,
                reason=reason or None,
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
        row = await self.read(lambda conn: ledger.row_of(conn, execution_id))
        command = p.Command(
            kind=kind, execution_id=execution_id, token=active.token, reason=row.reason or ""
        )
        await self.dispatch.command(active.group, active.worker, command)
        self.watch.expect_acknowledgement(execution_id)
        await self.tell(execution_id, f"{kind} sent to worker {active.worker}")

    # -- reports ---------------------------------------------------------------------------------------------

    async def _read_reports(self) -> None:
        groups = {
            self.keys.reports(group, shard): group
            for group in self.settings.groups
            for shard in self.shards.held
        }
        streams: dict[Any, Any] = dict.fromkeys(groups, "0-0")
        reply: Any = await self.dispatch.redis.xread(streams, count=READ_COUNT, block=READ_BLOCK_MS)
        for stream, entries in reply or []:
            group = groups[stream]
            for entry_id, fields in entries:
                handle = functools.partial(self._reported, group)
                await self._consume(stream, entry_id, parse_report(fields), handle)

    async def _reported(self, group: str, report: p.Report) -> None:
        active = self.active.get(report.execution_id) or await self.remember(report.execution_id)
        if active is None or active.group != group:
            await self._fence(group, report, "no such execution in this group")
            return
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
            await self._fence(group, report, "its lease is over")
            return
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
            await self.publish(active.id, events)
        await self._answer(report)

    async def _answer(self, report: p.Report) -> None:
        """What follows outside the records; repeated when a report is replayed."""
        body, execution_id = report.body, report.execution_id
        if isinstance(body, p.Leased):
            await self._grant(report, None)
            await self._forward_stop(execution_id)
        elif isinstance(body, p.GrantsWanted):
            await self._grant(report, body.requests[: p.MAX_GRANT_REQUESTS])
        elif isinstance(body, p.MetadataEvents):
            await self._check_stop_condition(execution_id, body.events)
        elif isinstance(body, p.StopAcknowledged):
            self.watch.acknowledged(execution_id)
        elif isinstance(body, p.Finished):
            await self._ended(execution_id)

    async def _check_stop_condition(self, execution_id: str, events: list[dict[str, Any]]) -> None:
        """M-40: stops the execution gracefully as soon as one of its metadata events satisfies the condition."""
        active = self.active.get(execution_id)
        if active is None or active.stop_requested or active.condition is None:
            return
        row = await self.read(lambda conn: ledger.row_of(conn, execution_id))
        try:
            met = any(
                is_met(
                    active.condition,
                    metadata={**row.cumulative_metadata, **event},
                    parameters=row.job["parameters"],
                )
                for event in events
            )
        except ConditionError as error:
            await self._tell_once(execution_id, f"stop-condition {active.condition!r}: {error}")
            return
        if met:
            await self.stop(
                execution_id, hard=False, reason=f"stop-condition met: {active.condition}"
            )

    async def _tell_once(self, execution_id: str, text: str) -> None:
        if (execution_id, text) not in self._warned:
            self._warned.add((execution_id, text))
            await self.tell(execution_id, text, kind=EventKind.warning)

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
        self._warned = {item for item in self._warned if item[0] != execution_id}
        self.watch.acknowledged(execution_id)
        await self.snapshot(execution_id)
        await self.dispatch.forget(row.group_name, execution_id, row.attempt, LIVE_LOG_SECONDS)
        await self.groups.reconcile(row.group_name)

    # -- capacity and losses ---------------------------------------------------------------------------------

    async def _tick(self) -> None:
        await self.seat.keep()
        await self.watch.tick()
        await self.groups.reconcile_all()
        await asyncio.sleep(TICK_SECONDS)

    async def worker_gone(self, worker: str, what: str) -> None:
        """A supervisor saw the worker die: its leases are over at once."""

        async def step() -> None:
            await self.watch.worker_gone(worker, what)
            await self.groups.reconcile_all()

        await self._patiently(step, "worker_gone")

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
