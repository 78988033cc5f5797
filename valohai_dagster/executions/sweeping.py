"""Removes what uploads have left in stores that nobody reported in time.

Of agents: only keys of attempts that are over, whose URLs have run out: such an upload cannot become a datum or a log
any more (`uploads.leftovers`), so nothing here races with an acceptance. Of the control plane itself: those that nobody
puts off any more, marked first (`own_uploads.give_up`). Removing is repeated until the store says that nothing is
there, then the records say so too; a crash in between repeats it. Any number of conductors sweep, each its shards; the
control plane's own uploads are with the first shard.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from valohai_dagster import telemetry
from valohai_dagster.data import own_uploads
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.errors import StoreError, StoreUnavailable
from valohai_dagster.executions import uploads
from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.executions.parted import open_parts
from valohai_dagster.executions.shards import Shards
from valohai_dagster.executions.uploads import Leftover, Mark
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.registry import Stores
from valohai_dagster.telemetry import Count

log = logging.getLogger(__name__)

SWEEP_SECONDS = 30.0  # between two looks when there was little to do
BUSY_SECONDS = 1.0  # likewise when there was much
AT_ONCE = 200  # uploads of one look
OWN_SHARD = 0  # whoever looks after it sweeps the control plane's own uploads
STORE_SECONDS = 30.0  # that one look waits for a store; it goes on in the background
FIRST_REST = timedelta(seconds=30)  # of a store that failed; doubled each time
LONGEST_REST = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What became of uploads of one store."""

    removed: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # why, by upload id


def remove_leftovers(leftovers: Iterable[Leftover], stores: Stores, key: SecretKey) -> Swept:
    """Removes what there is of them; blocks. A store that cannot be reached is not asked for the others."""
    swept = Swept()
    away: dict[str, str] = {}
    for leftover in leftovers:
        if leftover.store in away:
            swept.failures[leftover.upload_id] = away[leftover.store]
            continue
        try:
            _remove(leftover, stores[leftover.store], key)
        except StoreError as error:
            swept.failures[leftover.upload_id] = str(error)
            if isinstance(error, StoreUnavailable):
                away[leftover.store] = str(error)
        else:
            swept.removed.append(leftover.upload_id)
    return swept


def _remove(leftover: Leftover, store: Store, key: SecretKey) -> None:
    """The parts first: aborted ones can no longer be joined to an object behind our back.

    A conductor may have died between the beginning of an upload in parts and its note, so the store is asked too.
    """
    if leftover.parts is not None:
        store.abort_parts(leftover.key, open_parts(key, leftover.parts).upload)
    store.wipe(leftover.key)


def mark_removed(conn: sa.Connection, upload_ids: Sequence[str], now: datetime) -> int:
    """Nothing is left of them in their stores; how many of them were not known to be removed."""
    return uploads.mark_swept(conn, upload_ids, now) + own_uploads.forget(conn, upload_ids)


@dataclass(kw_only=True)
class _Rest:
    """How long a store that failed is left alone."""

    until: datetime
    length: timedelta


class Sweeper:
    """`step` in an endless loop."""

    def __init__(self, core: ServiceCore, shards: Shards, secret_key: SecretKey) -> None:
        self._core = core
        self._shards = shards
        self._secret_key = secret_key
        self.clock = core.clock
        self._mark: Mark | None = None
        self._rests: dict[str, _Rest] = {}
        self._working: dict[str, asyncio.Future[None]] = {}
        self._threads = ThreadPoolExecutor(thread_name_prefix="sweep")

    def close(self) -> None:
        """Waits for nothing: a store may hang, and what it removes is found again."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def step(self) -> None:
        busy = await self.sweep()
        await asyncio.sleep(BUSY_SECONDS if busy else SWEEP_SECONDS)

    async def sweep(self) -> bool:
        """One look; whether there may be more to do at once."""
        shards = [shard for shard in self._shards.held if self._shards.may_write(shard)]
        if not shards:
            return False
        core, now = self._core, self.clock()
        before = now - timedelta(seconds=core.settings.sweep_after_seconds)
        resting = [name for name, rest in self._rests.items() if rest.until > now]
        mark = self._mark
        found = await core.read(
            lambda conn: uploads.leftovers(
                conn,
                before=before,
                limit=AT_ONCE,
                shards=shards,
                without_stores=[*resting, *self._working],
                after=mark,
            )
        )
        full = len(found) == AT_ONCE
        self._mark = (found[-1].expires_at, found[-1].upload_id) if full else None
        own = await self._own(before, [*resting, *self._working]) if OWN_SHARD in shards else []
        await self._remove_all([*found, *own])
        return full or len(own) == AT_ONCE

    async def _own(self, before: datetime, without_stores: Sequence[str]) -> list[Leftover]:
        which: dict[str, Any] = {"before": before, "limit": AT_ONCE}
        which["without_stores"] = without_stores
        core = self._core
        if not await core.read(lambda conn: own_uploads.overdue(conn, **which)):
            return []
        given_up = await core.write(lambda conn: own_uploads.give_up(conn, **which))
        return [uploads.leftover_of(upload) for upload in given_up]

    async def _remove_all(self, found: Sequence[Leftover]) -> None:
        by_store: Mapping[str, list[Leftover]] = defaultdict(list)
        for leftover in found:
            by_store[leftover.store].append(leftover)
        for store, leftovers in by_store.items():
            task = asyncio.ensure_future(self._remove_from(store, leftovers))
            self._working[store] = task
            task.add_done_callback(lambda done, store=store: self._ended(store, done))
        if self._working:
            await asyncio.wait(set(self._working.values()), timeout=STORE_SECONDS)

    async def _remove_from(self, store: str, leftovers: list[Leftover]) -> None:
        core = self._core
        work = lambda: remove_leftovers(leftovers, core.stores, self._secret_key)  # noqa: E731
        swept = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        if swept.removed:
            await core.patiently(lambda: self._note(store, swept.removed), "sweeping")
        self._judge(store, swept)

    async def _note(self, store: str, removed: list[str]) -> None:
        now = self._core.clock()
        number = await self._core.write(lambda conn: mark_removed(conn, removed, now))
        telemetry.count(Count.swept, number, store=store)
        text = "removed %d unreported uploads from the store %r"
        log.info(text, number, store, extra={"action": "sweep", "store": store})

    def _judge(self, store: str, swept: Swept) -> None:
        if not swept.failures:
            self._rests.pop(store, None)
            return
        known = self._rests.get(store)
        length = FIRST_REST if known is None else min(known.length * 2, LONGEST_REST)
        self._rests[store] = _Rest(until=self.clock() + length, length=length)
        log.warning(
            "%d unreported uploads stay in the store %r for now, the next try is in %.0f s: %s",
            len(swept.failures),
            store,
            length.total_seconds(),
            next(iter(swept.failures.values())),
            extra={"action": "sweep-fail", "store": store},
        )

    def _ended(self, store: str, task: asyncio.Future[None]) -> None:
        self._working.pop(store, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("sweeping %r: %r", store, error, exc_info=error, extra={"action": "fail"})
            self._judge(store, Swept(failures={"": repr(error)}))
