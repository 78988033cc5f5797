"""Agents' reports: judged, applied and answered, as many at once as there are.

Order: the records first, then everybody who has to know, then the stream forgets the report. One that is delivered
again after a crash repeats only what followers or its agent may have missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from valohai_agent import protocol as p
from valohai_dagster import telemetry
from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.executions.dispatch import LeaseFacts
from valohai_dagster.executions.effects import Cause, apply_report, moment_of
from valohai_dagster.executions.grants import GrantPlanner, Lessee
from valohai_dagster.executions.lifecycle import Standing, Verdict, judge_report
from valohai_dagster.executions.memory import Active
from valohai_dagster.executions.minting import Minting
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.reading import StreamReader
from valohai_dagster.executions.restarts import Restarts
from valohai_dagster.executions.shards import Shards
from valohai_dagster.executions.stops import (
    StopConditions,
    add_final,
    end,
    forward_stop,
)
from valohai_dagster.executions.stream import ExecutionStatus
from valohai_dagster.executions.submissions import parse_report
from valohai_dagster.executions.writing import Writing
from valohai_dagster.telemetry import Count

log = logging.getLogger(__name__)

MAX_FAILURES = 3  # tries to handle one report before it is given up together with its execution
FAILURE_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """One entry of a stream; an unreadable one (None) is only deleted."""

    stream: str
    shard: int
    group: str
    entry_id: str
    fields: Mapping[str, Any]
    report: p.Report | None


class Reports:
    """`read` in an endless loop."""

    def __init__(
        self,
        core: ServiceCore,
        shards: Shards,
        planner: GrantPlanner,
        minting: Minting,
        restarts: Restarts,
    ) -> None:
        self._core = core
        self._shards = shards
        self._planner = planner
        self._minting = minting
        self._restarts = restarts
        self._conditions = StopConditions()
        self._groups = {
            core.keys.reports(group, shard): group
            for group in core.settings.groups
            for shard in range(core.records.shards)
        }
        groups = core.settings.groups
        self._reader = StreamReader(
            core, shards, lambda shard: [core.keys.reports(group, shard) for group in groups]
        )

    async def read(self) -> None:
        arrivals = [
            Arrival(
                stream=stream,
                shard=shard,
                group=self._groups[stream],
                entry_id=entry_id,
                fields=fields,
                report=parse_report(fields),
            )
            for stream, shard, entries in await self._reader.read()
            for entry_id, fields in entries
        ]
        if arrivals:
            async with self._core.reporting:
                await self._handle(arrivals)

    # -- batches -----------------------------------------------------------------------------------------------
    async def _handle(self, arrivals: Sequence[Arrival]) -> None:
        try:
            await self._apply(arrivals)
        except Exception as error:
            if len(arrivals) > 1:
                text = "handling %d reports one by one after %r"
                log.warning(text, len(arrivals), error, extra={"action": "one-by-one"})
            else:
                log.exception("cannot handle a report", extra={"action": "fail"})
        else:
            return
        for arrival in arrivals:
            await self._handle_one(arrival)

    async def _handle_one(self, arrival: Arrival) -> None:
        """One that fails for an unknown reason is tried again, then given up together with its execution: an
        execution that nobody can account for must not wait for ever.
        """
        failure: Exception | None = None
        for _ in range(MAX_FAILURES):
            try:
                return await self._apply([arrival])
            except Exception as error:
                log.exception("cannot handle a report", extra={"action": "fail"})
                failure = error
                await asyncio.sleep(FAILURE_PAUSE_SECONDS)
        outbox = await self._shards.insist(
            lambda: self._core.transact(lambda w: self._give_up(w, arrival, failure)), "giving up"
        )
        await self._core.deliver(outbox)
        return None

    async def _apply(self, arrivals: Sequence[Arrival]) -> None:
        core = self._core

        async def step() -> Outbox:
            # A lease that is not surely ours has been lost, or is claimed again soon: the entries stay.
            ours = [a for a in arrivals if self._shards.may_write(a.shard)]
            if not ours:
                return Outbox()
            leases = await core.dispatch.leases(self._leases_wanted(ours))
            return await core.transact(lambda writing: self._change(writing, ours, leases))

        cut_short = any(_cuts_short(arrival) for arrival in arrivals)
        async with core.admission if cut_short else contextlib.nullcontext():
            outbox = await self._shards.insist(step, "reports")
            for kind in outbox.applied:
                telemetry.count(Count.reports, kind=kind)
            for wish in outbox.wishes:
                self._minting.begin(wish)
            await core.deliver(outbox)
            await self._restarts.queue(outbox)

    def _leases_wanted(self, arrivals: Sequence[Arrival]) -> set[tuple[str, str]]:
        """Where a token has to be bound to an attempt, or grants to be sealed."""
        wanted: set[tuple[str, str]] = set()
        for arrival in arrivals:
            report = arrival.report
            if report is None:
                continue
            active = self._core.memory.active.get(report.execution_id)
            unbound = active is None or active.token is None
            if unbound or isinstance(report.body, (p.Leased, p.GrantsWanted)):
                wanted.add((arrival.group, report.execution_id))
        return wanted

    # -- on the records' thread --------------------------------------------------------------------------------
    def _change(
        self, writing: Writing, arrivals: Sequence[Arrival], leases: Mapping[str, LeaseFacts]
    ) -> Outbox:
        outbox, finished = Outbox(), dict[str, datetime]()
        for arrival in arrivals:
            if arrival.report is None:
                outbox.done(arrival.stream, arrival.entry_id)
                continue
            lease = leases.get(arrival.report.execution_id)
            if self._judge_and_apply(writing, outbox, arrival, arrival.report, lease):
                finished[arrival.report.execution_id] = moment_of(arrival.report)
        add_final(writing, outbox, finished, self._core, reported_at=finished)
        return outbox

    def _judge_and_apply(
        self,
        writing: Writing,
        outbox: Outbox,
        arrival: Arrival,
        report: p.Report,
        lease: LeaseFacts | None,
    ) -> bool:
        """Whether the execution has ended with this report."""
        outbox.done(arrival.stream, arrival.entry_id)
        active = writing.find(report.execution_id)
        if active is None or active.group != arrival.group:
            _fence(outbox, arrival.group, report, "no such execution in this group")
            return False
        if not writing.is_mine(active.shard):
            target = self._core.keys.reports(arrival.group, active.shard)
            outbox.posts.append((target, dict(arrival.fields)))  # to who looks after it
            return False
        verdict = _judge(active, report, lease)
        if verdict is Verdict.fence:
            _fence(outbox, arrival.group, report, "its lease is over")
        if verdict in (Verdict.fence, Verdict.drop):
            return False
        if verdict is Verdict.apply:
            cause = Cause(
                writing=writing,
                active=active,
                report=report,
                datum_url=self._core.settings.datum_url,
            )
            outbox.tell(active.id, *apply_report(cause))
            outbox.applied.append(report.body.kind)
            if _cuts_short(arrival) and not active.stop_requested:
                assert isinstance(report.body, p.Finished)
                if not self._restarts.after_finish(writing, outbox, active, report.body):
                    return False
        return self._answer(writing, outbox, report, lease)

    def _answer(
        self, writing: Writing, outbox: Outbox, report: p.Report, lease: LeaseFacts | None
    ) -> bool:
        """What follows outside the records; repeated when a report is replayed."""
        body = report.body
        active = writing.find(report.execution_id)
        assert active is not None
        if isinstance(body, (p.Leased, p.GrantsWanted)):
            if lease is not None and lease.token == report.token:  # a renewed one asks again
                self._grant(writing, outbox, active, body, lease)
            if isinstance(body, p.Leased):
                forward_stop(writing, outbox, active)
        elif isinstance(body, p.MetadataEvents):
            self._conditions.check(writing, outbox, active, body.events)
        elif isinstance(body, p.StopAcknowledged):
            outbox.stops_answered.append(active.id)
        elif isinstance(body, p.Finished):
            self._conditions.forget(active.id)
            outbox.ended.append((active.group, active.id, active.attempt))
            return True
        return False

    def _grant(
        self,
        writing: Writing,
        outbox: Outbox,
        active: Active,
        body: p.Leased | p.GrantsWanted,
        lease: LeaseFacts,
    ) -> None:
        to = Lessee(token=lease.token, public_key=lease.public_key)
        if isinstance(body, p.Leased):
            to = replace(to, uses_images=body.runtime != "process")
            wish = self._planner.initial(writing, active, to)
        else:
            wanted = body.requests[: p.MAX_GRANT_REQUESTS]
            wish = self._planner.requested(writing, active, wanted, to)
        if wish is not None:
            outbox.wishes.append(wish)

    def _give_up(self, writing: Writing, arrival: Arrival, failure: Exception | None) -> Outbox:
        outbox = Outbox()
        outbox.done(arrival.stream, arrival.entry_id)
        report = arrival.report
        active = writing.find(report.execution_id) if report else None
        if report is None or active is None or active.status.final:
            return outbox
        if not writing.is_mine(active.shard):
            return Outbox()
        if active.worker and active.token:
            command = p.Command(kind="fence", execution_id=active.id, token=active.token)
            outbox.commands.append((active.group, active.worker, command))
        reason = f"a defect of the execution service: {failure!r}; its log has the details"
        end(writing, outbox, active, ExecutionStatus.crashed, reason)
        add_final(writing, outbox, [active.id], self._core)
        return outbox


def _cuts_short(arrival: Arrival) -> bool:
    body = arrival.report.body if arrival.report is not None else None
    return isinstance(body, p.Finished) and body.preempted


def _judge(active: Active, report: p.Report, lease: LeaseFacts | None) -> Verdict:
    standing = Standing(
        status=active.status,
        attempt=active.attempt,
        token=active.token,
        last_seq=active.last_seq,
    )
    return judge_report(
        standing,
        attempt=report.attempt,
        token=report.token,
        seq=report.seq,
        lease_token=lease.token if lease is not None else None,
    )


def _fence(outbox: Outbox, group: str, report: p.Report, why: str) -> None:
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
    outbox.commands.append((group, report.worker, command))
