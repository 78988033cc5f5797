"""What every part of the execution service shares: records, Redis, memory, and telling followers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar

import redis
import redis.asyncio as aioredis
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from valohai_agent.protocol import Keys, utcnow
from valohai_agent.redis_link import is_transient
from valohai_dagster.broker.connection import load_functions, make_client
from valohai_dagster.executions import ledger
from valohai_dagster.executions.dispatch import Dispatch
from valohai_dagster.executions.memory import Active, Memory
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView, FollowEvent
from valohai_dagster.executions.views import views_of
from valohai_dagster.executions.waiting import queued
from valohai_dagster.executions.writing import Writing, transact
from valohai_dagster.records.engine import Records
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import Stores

log = logging.getLogger(__name__)
T = TypeVar("T")
Listener = Callable[[str, list[FollowEvent]], None]

OUTAGES = (redis.ConnectionError, redis.TimeoutError, OperationalError)
CANCEL_SECONDS = 0.2  # between two cancellations of the same task
OUTAGE_PAUSE_SECONDS = 0.5


class ServiceCore:
    """One thread talks to the database, so records and memory change together and in one order."""

    def __init__(
        self,
        settings: Settings,
        *,
        records: Records,
        broker: aioredis.Redis,
        broker_url: str,
        stores: Stores,
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self.settings = settings
        self.records = records
        self.stores = stores
        self.clock = clock
        self.keys = Keys(records.deployment_id)
        self.dispatch = Dispatch(broker, self.keys)
        self.memory = Memory()
        self.epochs: dict[int, str | None] = {}  # of the Redis that each shard was last served from
        self.admission = asyncio.Lock()  # between writing that something is queued, and queueing it
        self.reporting = asyncio.Lock()  # while a batch of reports is in hand
        self.last_work = clock()
        self._broker_url = broker_url
        self._listeners: list[Listener] = []
        self._on_delivered: list[Callable[[Outbox], None]] = []
        self._database = ThreadPoolExecutor(max_workers=1, thread_name_prefix="records")

    def close(self) -> None:
        self._database.shutdown(wait=True)

    # -- records -----------------------------------------------------------------------------------------------
    async def read(self, query: Callable[[sa.Connection], T]) -> T:
        def call() -> T:
            with self.records.read() as conn:
                return query(conn)

        return await self._in_order(call)

    async def write(self, change: Callable[[sa.Connection], T]) -> T:
        """One transaction over tables that are not the executions'."""

        def call() -> T:
            with self.records.write() as conn:
                return change(conn)

        return await self._in_order(call)

    async def transact(self, change: Callable[[Writing], T]) -> T:
        """One transaction over executions. Raises `ShardLost` when it touches a shard that is not ours; nothing is written then."""
        return await self._in_order(
            lambda: transact(self.records, self.memory, self.memory.fences, self.clock(), change)
        )

    async def find(self, execution_id: str) -> Active | None:
        """The execution, an ended one too; None if there is none."""
        known = self.memory.active.get(execution_id)
        return known or await self.read(lambda conn: ledger.active_of(conn, execution_id))

    async def take_over(self, shards: Collection[int], holder: str) -> int:
        """Makes the shards ours in the records and loads what they have in hand; the number of executions."""

        def call() -> int:
            with self.records.write() as conn:
                fences = ledger.take_shards(conn, shards, holder)
                found = ledger.unfinished(conn, shards)
                epochs = ledger.epochs_of(conn, shards)
            self.memory.take_shards(fences, found)
            self.epochs.update(epochs)
            return len(found)

        return await self._in_order(call)

    async def forget_shard(self, shard: int) -> None:
        await self._in_order(lambda: self.memory.drop_shard(shard))

    async def quiet(self) -> None:
        """Waits until everything that is in hand now has ended."""
        for lock in (self.admission, self.reporting):
            async with lock:
                pass

    async def _in_order(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._database, call)

    # -- telling -----------------------------------------------------------------------------------------------
    def listen(self, listener: Listener) -> None:
        """`listener` is called on the event loop for all events of every execution, after the records changed.

        It must return at once and not raise. After an outage the same event may come twice.
        """
        self._listeners.append(listener)

    def on_delivered(self, callback: Callable[[Outbox], None]) -> None:
        """For other parts of the service: called with everything that was said."""
        self._on_delivered.append(callback)

    async def deliver(self, outbox: Outbox) -> None:
        """Tells the listeners in this process, then everybody else, however long Redis is away."""
        for execution_id, events in outbox.events:
            _log_events(execution_id, events)
            for listener in self._listeners:
                listener(execution_id, events)
        self.last_work = self.clock()
        await self.patiently(lambda: self.dispatch.deliver(outbox), "telling")
        for callback in self._on_delivered:
            callback(outbox)

    async def tell(
        self, execution_id: str, text: str, *, kind: EventKind = EventKind.state, **data: Any
    ) -> None:
        active = self.memory.active.get(execution_id)
        attempt = active.attempt if active else 1
        event = FollowEvent(kind=kind, time=self.clock(), attempt=attempt, message=text, data=data)
        await self.deliver(Outbox(events=[(execution_id, [event])]))

    async def view(self, execution_id: str) -> ExecutionView | None:
        """How the execution stands in the records."""
        url = self.settings.datum_url
        views = await self.read(lambda conn: views_of(conn, [execution_id], datum_url=url))
        return views.get(execution_id)

    async def snapshot(self, execution_id: str) -> None:
        """Publishes how the execution stands; `final` when it has ended."""
        view = await self.view(execution_id)
        if view is not None:
            event = standing_event(view, self.clock())
            await self.deliver(Outbox(events=[(execution_id, [event])]))

    # -- outages -----------------------------------------------------------------------------------------------
    async def patiently(self, step: Callable[[], Awaitable[T]], name: str) -> T:
        """Runs a step; what it could not finish because a server is away is tried again later."""
        while True:
            try:
                return await step()
            except (redis.RedisError, DBAPIError, OSError) as error:
                if not is_outage(error):
                    raise
                log.warning("%s waits: %s", name, error, extra={"action": "outage", "step": name})
                if "unction not found" in str(error):
                    await self.load_functions()
                    continue
            await asyncio.sleep(OUTAGE_PAUSE_SECONDS)

    async def load_functions(self) -> None:
        client = make_client(self._broker_url)
        try:
            await asyncio.to_thread(load_functions, client)
        except redis.RedisError as error:
            extra = {"action": "outage", "step": "functions"}
            log.warning("the functions cannot be loaded yet: %s", error, extra=extra)
            await asyncio.sleep(OUTAGE_PAUSE_SECONDS)
        finally:
            client.close()


def _log_events(execution_id: str, events: list[FollowEvent]) -> None:
    for event in events:
        if event.kind in _LOGGED:
            extra = {"action": event.kind.value, "execution": execution_id}
            log.info("%s: %s", execution_id, event.message, extra=extra)


_LOGGED = {EventKind.state, EventKind.warning, EventKind.final}


def is_outage(error: BaseException) -> bool:
    """Whether a server is away or cannot do it now, so that waiting can cure it."""
    if isinstance(error, DBAPIError):
        return isinstance(error, OperationalError) or error.connection_invalidated
    return is_transient(error)


def standing_event(view: ExecutionView, now: datetime) -> FollowEvent:
    """`snapshot`, or `final` when the execution has ended."""
    return FollowEvent(
        kind=EventKind.final if view.status.final else EventKind.snapshot,
        time=now,
        attempt=view.attempt,
        message=f"{view.status.value}: {view.reason}" if view.reason else view.status.value,
        data=view.model_dump(mode="json"),
        view=view,
    )


def queued_event(group: str, ahead: int, attempt: int, now: datetime) -> FollowEvent:
    return FollowEvent(
        kind=EventKind.state,
        time=now,
        attempt=attempt,
        message=queued(group, ahead),
        data={"status": ExecutionStatus.queued.value, "ahead": ahead},
    )


def held_event(why: str, now: datetime) -> FollowEvent:
    data = {"status": ExecutionStatus.created.value}
    return FollowEvent(kind=EventKind.state, time=now, message=why, data=data)


async def run_all(*parts: Coroutine[Any, Any, None]) -> None:
    """Runs them until all are done or one fails; then, or when cancelled itself, ends the others.

    Cancels until they are over: a client library may turn a cancellation into an error that we retry.
    """
    pending = {asyncio.ensure_future(part) for part in parts}
    try:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        await cancel_all(pending)


async def cancel_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancels until they are over: a cancellation that meets news may be swallowed."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_SECONDS)
