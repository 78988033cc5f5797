"""What every part of the execution service shares: records, Redis, memory, and telling followers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar

import redis.asyncio as aioredis
import sqlalchemy as sa

from valohai_agent.protocol import Keys, utcnow
from valohai_dagster.executions import ledger
from valohai_dagster.executions.dispatch import Dispatch
from valohai_dagster.executions.stream import EventKind, ExecutionView, FollowEvent
from valohai_dagster.executions.views import view_of
from valohai_dagster.records.engine import Records
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import Stores

log = logging.getLogger(__name__)
T = TypeVar("T")
Listener = Callable[[str, list[FollowEvent]], None]

CANCEL_SECONDS = 0.2  # between two cancellations of the same task


class ServiceCore:
    """One thread talks to the database, so the records change in one order."""

    def __init__(
        self,
        settings: Settings,
        *,
        records: Records,
        broker: aioredis.Redis,
        stores: Stores,
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self.settings = settings
        self.records = records
        self.stores = stores
        self.clock = clock
        self.keys = Keys(records.deployment_id)
        self.dispatch = Dispatch(broker, self.keys)
        self.active: dict[str, ledger.Active] = {}
        self._listeners: list[Listener] = []
        self._database = ThreadPoolExecutor(max_workers=1, thread_name_prefix="records")

    def close(self) -> None:
        self._database.shutdown(wait=True)

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

    async def remember(self, execution_id: str) -> ledger.Active | None:
        """Brings the memory in line with the records; ended executions are forgotten."""
        active = await self.read(lambda conn: ledger.active_of(conn, execution_id))
        if active is None or active.status.final:
            self.active.pop(execution_id, None)
        else:
            self.active[execution_id] = active
        return active

    def listen(self, listener: Listener) -> None:
        """`listener` is called on the event loop for all events of every execution, after the records changed.

        It must return at once and not raise. After an outage the same event may come twice.
        """
        self._listeners.append(listener)

    async def publish(self, execution_id: str, events: list[FollowEvent]) -> None:
        """Tells the listeners in this process, then the followers in others."""
        for listener in self._listeners:
            listener(execution_id, events)
        await self.dispatch.publish(execution_id, events)

    async def view(self, execution_id: str) -> ExecutionView | None:
        """How the execution stands in the records."""
        datum_url = self.settings.datum_url
        return await self.read(lambda conn: view_of(conn, execution_id, datum_url=datum_url))

    async def snapshot(self, execution_id: str) -> None:
        """Publishes how the execution stands; `final` when it has ended."""
        view = await self.view(execution_id)
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
        await self.publish(execution_id, [event])

    async def tell(
        self, execution_id: str, text: str, *, kind: EventKind = EventKind.state, **data: Any
    ) -> None:
        active = self.active.get(execution_id)
        attempt = active.attempt if active else 1
        log.info(
            "%s: %s", execution_id, text, extra={"action": kind.value, "execution": execution_id}
        )
        event = FollowEvent(kind=kind, time=self.clock(), attempt=attempt, message=text, data=data)
        await self.publish(execution_id, [event])


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
        while pending:
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=CANCEL_SECONDS)
