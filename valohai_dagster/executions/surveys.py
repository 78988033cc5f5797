"""Executions whose inputs lie in stores behind a network: asked in threads, with a time limit, outside any transaction.
Also those that wait for a quota, which are looked at again when their turn has come.

Such an execution is written down as `created` first, so nothing is lost when this process dies: whoever looks after
its shard then asks again. A store that is slow holds up nobody but those who want its files.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from valohai_dagster.data.survey import Answer, Pattern, look
from valohai_dagster.errors import StoreError, StoreUnavailable, ValohaiError
from valohai_dagster.executions import ledger
from valohai_dagster.executions.admission import Admission, Admitted
from valohai_dagster.executions.core import ServiceCore, cancel_all, queued_event
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.quotas import held
from valohai_dagster.executions.shards import Shards
from valohai_dagster.executions.stops import add_final
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, FollowEvent
from valohai_dagster.executions.writing import Writing

log = logging.getLogger(__name__)

ANSWER_SECONDS = (
    120.0  # without any answer of a store, after which those who wait for it are refused
)
THREADS = 4  # that ask one store at once
MAX_FAILURES = 3  # tries to go on with one execution before it is given up


class Surveys:
    """`look` about once a second; `begin` for an execution that was just created."""

    def __init__(self, core: ServiceCore, shards: Shards, admission: Admission) -> None:
        self._core = core
        self._shards = shards
        self._admission = admission
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failures: Counter[str] = Counter()
        self._asking: dict[Pattern, asyncio.Future[Answer]] = {}
        self._last: dict[str, float] = {}  # when a store has answered, by the loop's clock
        self._pools: dict[str, ThreadPoolExecutor] = {}

    async def look(self) -> None:
        """Takes up what others have left, after a start or a change of shards, and those whose turn has come (L-10)."""
        core = self._core
        created = [a for a in core.memory.all() if a.status is ExecutionStatus.created]
        mine = [a for a in created if self._shards.may_write(a.shard) and a.id not in self._tasks]
        if not mine:
            return
        groups = {active.group for active in mine}
        waiting = await core.read(lambda conn: held(conn, core.settings, groups))
        for active in mine:
            if active.id not in waiting:
                self.begin(active.id)

    def begin(self, execution_id: str) -> None:
        if execution_id not in self._tasks:
            task = asyncio.ensure_future(self._run(execution_id))
            self._tasks[execution_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(execution_id, None))

    async def leave(self) -> None:
        """Stops asking; what was not answered is asked again by whoever comes next."""
        await cancel_all([*self._tasks.values(), *self._asking.values()])
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, execution_id: str) -> None:
        try:
            await self._settle(execution_id)
        except Exception as error:
            log.exception("cannot go on with %s", execution_id, extra={"action": "fail"})
            self._failures[execution_id] += 1
            if self._failures[execution_id] >= MAX_FAILURES:
                await self._give_up(execution_id, error)
        else:
            self._failures.pop(execution_id, None)

    async def _settle(self, execution_id: str) -> None:
        core = self._core
        row = await core.patiently(
            lambda: core.read(lambda conn: ledger.row_of(conn, execution_id)), "surveying"
        )
        patterns = self._admission.patterns_of(ledger.spec_of(row))
        found = await asyncio.gather(*(self.ask(pattern) for pattern in patterns))
        answers = dict(zip(patterns, found, strict=True))

        def change(writing: Writing) -> tuple[Admitted | None, Outbox]:
            outbox = Outbox()
            admitted = self._admission.settle(writing, execution_id, answers)
            if admitted is not None and admitted.queue is None:
                add_final(writing, outbox, [execution_id], core)
            return admitted, outbox

        async with core.admission:
            admitted, outbox = await self._shards.insist(lambda: core.transact(change), "surveying")
            if admitted is not None and admitted.queue is not None:
                await self._queue(admitted, outbox)
        await core.deliver(outbox)

    async def _queue(self, admitted: Admitted, outbox: Outbox) -> None:
        core, entry = self._core, admitted.queue
        assert entry is not None
        (ahead,) = await core.patiently(lambda: core.dispatch.enqueue(entry), "queueing")
        outbox.queued.add(entry.job.group)
        outbox.tell(entry.job.execution_id, *changed_events(core, admitted))
        if ahead is not None:
            event = queued_event(entry.job.group, ahead, entry.job.attempt, core.clock())
            outbox.tell(entry.job.execution_id, event)

    async def _give_up(self, execution_id: str, error: Exception) -> None:
        """An execution that nobody can go on with must not wait for ever."""
        del self._failures[execution_id]
        core = self._core
        reason = f"a defect of the execution service: {error!r}; its log has the details"

        def change(writing: Writing) -> Outbox:
            outbox = Outbox()
            active = writing.find(execution_id)
            if active is not None and writing.is_mine(active.shard) and not active.status.final:
                ended = {"status": ExecutionStatus.crashed.value, "reason": reason}
                writing.update(active, **ended, ended_at=writing.now)
                writing.change(active, status=ExecutionStatus.crashed)
                add_final(writing, outbox, [execution_id], core)
            return outbox

        await core.deliver(await self._shards.insist(lambda: core.transact(change), "giving up"))

    # -- stores ------------------------------------------------------------------------------------------------
    async def ask(self, pattern: Pattern) -> Answer:
        """What the store answers; several executions that want the same are answered together."""
        loop, store = asyncio.get_running_loop(), pattern.store
        future = self._asking.get(pattern)
        if future is None:
            future = loop.run_in_executor(self._pool(store), self._look, pattern)
            self._asking[pattern] = future
            future.add_done_callback(lambda done: self._answered(pattern, done))
        asked = loop.time()
        while True:
            done, _ = await asyncio.wait({future}, timeout=ANSWER_SECONDS)
            if done:
                return future.result()
            if loop.time() - max(asked, self._last.get(store, asked)) >= ANSWER_SECONDS:
                break
        self._asking.pop(pattern, None)  # later ones ask anew
        text = f"the store {store!r} has not answered within {ANSWER_SECONDS:.0f} s; launch again later"
        return StoreUnavailable(text, store=store)

    def _answered(self, pattern: Pattern, future: asyncio.Future[Answer]) -> None:
        if self._asking.get(pattern) is future:
            del self._asking[pattern]
        self._last[pattern.store] = asyncio.get_running_loop().time()

    def _pool(self, store: str) -> ThreadPoolExecutor:
        """A pool per store, so that one that hangs blocks no other."""
        if store not in self._pools:
            name = f"store-{store}"
            self._pools[store] = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix=name)
        return self._pools[store]

    def _look(self, pattern: Pattern) -> Answer:
        try:
            return look(self._core.stores.get(pattern.store), pattern)
        except ValohaiError as error:
            return error
        except Exception as error:
            log.exception("asking the store %s failed", pattern.store, extra={"action": "fail"})
            text = f"the store {pattern.store!r} failed with {type(error).__name__}; the conductor's log has the details"
            return StoreError(text, store=pattern.store)


def changed_events(core: ServiceCore, admitted: Admitted) -> list[FollowEvent]:
    """Tells of inputs that have changed since their last use (I-32)."""
    now = core.clock()
    return [
        FollowEvent(kind=EventKind.warning, time=now, message=text) for text in admitted.changed
    ]
