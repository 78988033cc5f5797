"""Which shards this process looks after, and whether it may still act on them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from valohai_dagster.records.engine import Records


class Shards:
    """All shards, for as long as the seat of the service is ours."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._taken: list[Callable[[int], Awaitable[None]]] = []
        self._lost: list[Callable[[int], Awaitable[None] | None]] = []
        self.held: frozenset[int] = frozenset()

    def of(self, key: str) -> int:
        """The shard of a run, or of an execution without one, by its id."""
        return self._records.shard_of(key)

    def may_write(self, shard: int) -> bool:
        """Whether the lease is surely ours at this moment."""
        return shard in self.held

    def on_taken(self, callback: Callable[[int], Awaitable[None]]) -> None:
        """Called in a task of its own once a shard is held; cancelled when the shard is lost meanwhile."""
        self._taken.append(callback)

    def on_lost(self, callback: Callable[[int], Awaitable[None] | None]) -> None:
        """Called when a shard is no longer ours to act on. An orderly hand-over waits for what it returns."""
        self._lost.append(callback)

    async def take_all(self) -> None:
        self.held = frozenset(range(self._records.shards))
        for shard in self.held:
            for callback in self._taken:
                await callback(shard)
