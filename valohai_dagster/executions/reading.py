"""Reading what waits in the streams of our shards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.executions.shards import Shards

BLOCK_MS = 2_000
BATCH = 256  # entries of one read, if they are spread evenly over the streams
FEWEST = 8  # entries of one stream in one read
PACE_SECONDS = 0.02  # between two reads of a busy stream: what comes meanwhile is handled at once
UNSURE_SECONDS = 0.2  # pause while a lease that was not renewed in time is claimed again


class StreamReader:
    """One blocking read at a time; it ends early when our shards change."""

    def __init__(
        self, core: ServiceCore, shards: Shards, streams_of: Callable[[int], Iterable[str]]
    ) -> None:
        self._core = core
        self._shards = shards
        self._streams_of = streams_of
        self._news = asyncio.Event()
        self._reading: asyncio.Future[Any] | None = None
        self._shard_of: dict[str, int] = {}
        self._last = 0.0  # when something was read
        shards.on_change(self.interrupt)

    def interrupt(self) -> None:
        self._shard_of = {
            stream: shard for shard in self._shards.held for stream in self._streams_of(shard)
        }
        self._news.set()
        if self._reading is not None:
            self._reading.cancel()

    async def read(self) -> list[tuple[str, int, Any]]:
        """(stream, shard, entries) of what waits, oldest first; nothing when the time is up or the shards changed."""
        self._news.clear()
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._last + PACE_SECONDS - loop.time())
        shard_of = self._shard_of
        streams = [name for name, shard in shard_of.items() if self._shards.may_write(shard)]
        if not streams:
            await self._pause(None if not shard_of else UNSURE_SECONDS)
            return []
        count = max(FEWEST, BATCH // len(streams))
        self._reading = asyncio.ensure_future(
            self._core.dispatch.read_streams(streams, count=count, block_ms=BLOCK_MS)
        )
        try:
            reply = await self._reading
        except asyncio.CancelledError:
            if not self._news.is_set():
                self._reading.cancel()
                raise
            reply = []
        finally:
            self._reading = None
        self._last = loop.time() if reply else 0.0
        return [(stream, shard_of[stream], entries) for stream, entries in reply]

    async def _pause(self, seconds: float | None) -> None:
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except asyncio.TimeoutError:
            return
