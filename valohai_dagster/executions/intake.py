"""Submissions: new executions and stop requests, from other processes through Redis and from this one directly."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from valohai_dagster.executions.admission import Admission, Admitted
from valohai_dagster.executions.core import (
    ServiceCore,
    held_event,
    queued_event,
    standing_event,
)
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.reading import StreamReader
from valohai_dagster.executions.shards import Shards
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.executions.stops import Stops
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.executions.submissions import Submission, parse_submission
from valohai_dagster.executions.surveys import Surveys, changed_events
from valohai_dagster.executions.writing import ShardLost

log = logging.getLogger(__name__)

BATCH = 100  # submissions of one transaction
MAX_FAILURES = 3  # tries to handle one submission before it is given up
FAILURE_PAUSE_SECONDS = 0.5


class Intake:
    """`read` and `take` in endless loops."""

    def __init__(
        self,
        core: ServiceCore,
        shards: Shards,
        admission: Admission,
        stops: Stops,
        surveys: Surveys,
    ) -> None:
        self._core = core
        self._shards = shards
        self._admission = admission
        self._stops = stops
        self._surveys = surveys
        self._reader = StreamReader(core, shards, lambda shard: [core.keys.submissions(shard)])
        self._waiting: asyncio.Queue[tuple[ExecutionSpec, asyncio.Future[ExecutionView]]] = (
            asyncio.Queue()
        )

    # -- from this process -------------------------------------------------------------------------------------
    async def submit(self, spec: ExecutionSpec) -> ExecutionView:
        answer: asyncio.Future[ExecutionView] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((spec, answer))
        return await answer

    async def take(self) -> None:
        """Handles what this process has submitted, everything that waits at once."""
        items = [await self._waiting.get()]
        while len(items) < BATCH and not self._waiting.empty():
            items.append(self._waiting.get_nowait())
        try:
            admitted = await self._admit_all([spec for spec, _ in items])
        except BaseException:
            for _, answer in items:
                answer.cancel()
            raise
        await self._tell(admitted, Outbox(), standing=False)
        for (_, answer), one in zip(items, admitted, strict=True):
            if answer.done():
                continue
            if one.view is None:
                answer.set_exception(ShardLost(one.shard))
            else:
                answer.set_result(one.view)

    # -- from other processes ----------------------------------------------------------------------------------
    async def read(self) -> None:
        for stream, shard, entries in await self._reader.read():
            messages = [(entry_id, parse_submission(fields)) for entry_id, fields in entries]
            for is_stop, run in groupby(messages, _is_stop):
                if not self._shards.may_write(shard):
                    return
                handle = self._stop_each if is_stop else self._execute_all
                await handle(stream, list(run))

    async def _stop_each(self, stream: str, messages: list[tuple[str, Submission | None]]) -> None:
        for entry_id, message in messages:
            if message is not None:
                await self._stops.stop(
                    message.execution_id, hard=message.hard, reason=message.reason
                )
            await self._core.deliver(Outbox(handled={stream: [entry_id]}))

    async def _execute_all(
        self, stream: str, messages: list[tuple[str, Submission | None]]
    ) -> None:
        specs = [m.spec for _, m in messages if m is not None and m.spec is not None]
        admitted = await self._admit_all(specs)
        handled = {stream: [entry_id for entry_id, _ in messages]}
        await self._tell(admitted, Outbox(handled=handled), standing=True)

    # -- both --------------------------------------------------------------------------------------------------
    async def _admit_all(self, specs: Sequence[ExecutionSpec]) -> list[Admitted]:
        if not specs:
            return []
        try:
            return await self._admit(specs)
        except Exception as error:
            if len(specs) > 1:
                text = "admitting %d submissions one by one after %r"
                log.warning(text, len(specs), error, extra={"action": "one-by-one"})
            else:
                log.exception("cannot admit %s", specs[0].execution_id, extra={"action": "fail"})
        return [await self._admit_one(spec) for spec in specs]

    async def _admit_one(self, spec: ExecutionSpec) -> Admitted:
        """One that fails for an unknown reason is tried again, then given up: nobody must wait for it for ever."""
        failure: Exception | None = None
        for _ in range(MAX_FAILURES):
            try:
                (admitted,) = await self._admit([spec])
            except Exception as error:
                log.exception("cannot admit %s", spec.execution_id, extra={"action": "fail"})
                failure = error
                await asyncio.sleep(FAILURE_PAUSE_SECONDS)
            else:
                return admitted
        reason = f"a defect of the execution service: {failure!r}; its log has the details"
        core, crash = self._core, self._admission.crash
        try:
            await core.patiently(
                lambda: core.transact(lambda w: crash(w, spec, reason)), "giving up"
            )
        except ShardLost as lost:
            await self._shards.lose(lost.shard)
            return Admitted(spec=spec, shard=lost.shard, elsewhere=True)
        view = await core.view(spec.execution_id)
        return Admitted(spec=spec, shard=self._shards.of(spec.execution_id), view=view, new=True)

    async def _admit(self, specs: Sequence[ExecutionSpec]) -> list[Admitted]:
        """Written first, then queued; a stop waits until both are done."""
        core = self._core
        async with core.admission:
            admitted = await self._shards.insist(
                lambda: core.transact(lambda w: self._admission.admit(w, specs)), "admitting"
            )
            entries = {one.spec.execution_id: one.queue for one in admitted if one.queue}
            if not entries:
                return admitted
            ranks = await core.patiently(
                lambda: core.dispatch.enqueue(*entries.values()), "queueing"
            )
        ahead = dict(zip(entries, ranks, strict=True))
        return [replace(one, ahead=ahead.get(one.spec.execution_id)) for one in admitted]

    async def _tell(self, admitted: Sequence[Admitted], outbox: Outbox, *, standing: bool) -> None:
        """Followers hear what was done, and with `standing` how every execution stands."""
        now = self._core.clock()
        for one in admitted:
            if one.elsewhere:
                entry = Submission(
                    kind="execute", execution_id=one.spec.execution_id, spec=one.spec
                )
                post = (self._core.keys.submissions(one.shard), {"s": entry.model_dump_json()})
                outbox.posts.append(post)
                continue
            if one.ahead is not None and one.queue is not None:
                event = queued_event(one.queue.job.group, one.ahead, one.queue.job.attempt, now)
                outbox.tell(one.spec.execution_id, event)
            if one.view is not None and (standing or (one.new and one.view.status.final)):
                outbox.tell(one.spec.execution_id, standing_event(one.view, now))
            if one.waits is not None:
                outbox.tell(one.spec.execution_id, held_event(one.waits, now))
            outbox.tell(one.spec.execution_id, *changed_events(self._core, one))
            if one.queue is not None:
                outbox.queued.add(one.queue.job.group)
        await self._core.deliver(outbox)
        for one in admitted:
            created = one.view is not None and one.view.status is ExecutionStatus.created
            if created and one.waits is None:
                self._surveys.begin(one.spec.execution_id)


def _is_stop(item: tuple[str, Submission | None]) -> bool:
    return item[1] is not None and item[1].kind == "stop"
