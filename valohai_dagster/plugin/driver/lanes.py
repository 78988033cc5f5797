"""Where the driver's blocking calls run: a run's calls in order, one after the other, different runs side by side.

Dagster's storages are synchronous, and a run's events must appear in their order, so every run has a lane: a thread
that it shares with other runs. A database that is away makes a lane wait, not fail; nothing is dropped, and an event
whose log row was written before the connection broke is not written again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dagster import DagsterInstance, EventLogEntry

from valohai_dagster import telemetry
from valohai_dagster.plugin.compat.storage import (
    is_database_outage,
    storage_is_gone,
    store_together,
    touches_log_only,
)
from valohai_dagster.plugin.driver.recovery import complete_last_event
from valohai_dagster.telemetry import Seconds

log = logging.getLogger(__name__)
T = TypeVar("T")

LANES = 8
OUTAGE_PAUSE_SECONDS = 0.5
FLUSH_SECONDS = 10.0


class LaneClosed(Exception):
    """The conductor is ending, or may not write for this run any more; what is not written yet stays to be done."""


class InstanceGone(Exception):
    """The run's Dagster instance was deleted: nobody will look at the run any more."""


class Lanes:
    """Threads and the count of what waits in them."""

    def __init__(self, count: int = LANES) -> None:
        self._count = count
        self._threads: dict[int, list[ThreadPoolExecutor]] = {}  # one set per instance
        self._closing = threading.Event()
        self.backlog = 0  # calls that wait or run now
        self.written = 0  # events since the start

    def _lane(self, run_id: str, instance: DagsterInstance | None) -> ThreadPoolExecutor:
        """An instance whose storage is away holds up its own runs only."""
        threads = self._threads.get(id(instance))
        if threads is None:
            threads = [
                ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"lane-{n}")
                for n in range(self._count)
            ]
            self._threads[id(instance)] = threads
        return threads[zlib.crc32(run_id.encode()) % self._count]

    async def flush(self) -> None:
        """Until what the lanes have in hand now is done, or some seconds have passed."""
        loop = asyncio.get_running_loop()
        calls = [
            loop.run_in_executor(thread, _nothing)
            for threads in self._threads.values()
            for thread in threads
        ]
        if calls:
            await asyncio.wait(calls, timeout=FLUSH_SECONDS)

    async def run(
        self, run_id: str, call: Callable[[], T], instance: DagsterInstance | None = None
    ) -> T:
        """The call's result, from the run's lane; repeated while the database is away, so it must be repeatable.

        Raises `InstanceGone` when it is not away but deleted, as the directory of a Dagster that had no home.
        """
        lane = self._lane(run_id, instance)
        self.backlog += 1
        begun = time.monotonic()
        try:
            work = asyncio.get_running_loop().run_in_executor(lane, self._patiently, call, instance)
            return await work
        finally:
            self.backlog -= 1
            telemetry.observe(Seconds.lane, time.monotonic() - begun)

    async def write(
        self,
        instance: DagsterInstance,
        run_id: str,
        entries: Sequence[EventLogEntry],
        may_write: Callable[[], bool],
    ) -> None:
        """Stores the entries in order. Raises `LaneClosed` when this process may not write for the run any more."""
        if entries:
            await self.run(run_id, _Writing(self, instance, entries, may_write), instance)

    def _patiently(self, call: Callable[[], T], instance: DagsterInstance | None) -> T:
        while True:
            if self._closing.is_set():
                raise LaneClosed
            try:
                return call()
            except Exception as error:
                if not is_database_outage(error):
                    raise
                if instance is not None and storage_is_gone(instance):
                    raise InstanceGone("its directory is not there any more") from error
                log.warning(
                    "Dagster's storage is away, waiting: %s",
                    str(error).splitlines()[0],
                    extra={"action": "outage", "step": "events"},
                )
            self._closing.wait(OUTAGE_PAUSE_SECONDS)

    def close(self) -> None:
        """Ends the lanes once the call in hand of each is done; calls that wait raise `LaneClosed`."""
        self._closing.set()
        for threads in self._threads.values():
            for thread in threads:
                thread.shutdown(wait=True)


def _nothing() -> None:
    """What a lane does to show that it got here."""


class _Writing:
    """One batch of a run; called again after an outage it goes on where it was."""

    def __init__(
        self,
        lanes: Lanes,
        instance: DagsterInstance,
        entries: Sequence[EventLogEntry],
        may_write: Callable[[], bool],
    ) -> None:
        self._lanes, self._instance, self._may_write = lanes, instance, may_write
        self._left = list(entries)
        self._torn = False  # the first of those left may have been stored in part

    def __call__(self) -> None:
        while self._left:
            if not self._may_write():
                raise LaneClosed
            batch = self._next()
            if not (self._torn and complete_last_event(self._instance, batch[-1])):
                self._torn = True
                self._store(batch)
            self._torn = False
            del self._left[: len(batch)]
            self._lanes.written += len(batch)

    def _next(self) -> list[EventLogEntry]:
        """The next events that are stored whole or not at all: one, or several that touch nothing but the log."""
        batch = list(itertools.takewhile(touches_log_only, self._left))
        return batch or self._left[:1]

    def _store(self, batch: list[EventLogEntry]) -> None:
        if len(batch) > 1:
            store_together(self._instance, batch)
        else:
            self._instance.handle_new_event(batch[0])
