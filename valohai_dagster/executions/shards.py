"""Which shards this conductor looks after, and whether it may still act for them.

Every shard is leased in Redis by one conductor; any number of conductors share them. A lease alone cannot stop a
process that was paused and wakes up late, so the records count the holders of each shard (its fence): taking a shard
over makes every later write of the one before fail, see `writing`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import redis

from valohai_dagster.executions import ledger
from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.executions.identity import Identity
from valohai_dagster.executions.share_out import LEASE_SECONDS, is_safe, share_out
from valohai_dagster.executions.writing import ShardLost

log = logging.getLogger(__name__)
T = TypeVar("T")

RENEW_SECONDS = 3.0
BALANCE_SECONDS = 1.0
HANDOVER_SECONDS = 10.0  # how long an orderly hand-over waits for what is still being written
CALM_SECONDS = 3.0  # after an outage of Redis: every conductor gets the time to claim its own again

Taken = Callable[[int], Awaitable[None]]
Lost = Callable[[int], "Awaitable[None] | None"]


def steady_time() -> float:
    """Seconds that pass also while the machine sleeps, where the system knows them."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


class Shards:
    """`keep` and `balance` in endless loops; `release_all` before a conductor goes."""

    def __init__(self, core: ServiceCore, identity: Identity) -> None:
        self.held: frozenset[int] = frozenset()
        self._core = core
        self._me = identity.name
        self._gone = identity.home  # an earlier conductor of this place has left its shards to us
        self._leaving = False
        self._renewed: dict[int, float] = {}  # ours in Redis, by the time when the renewal was sent
        self._claiming = asyncio.Lock()
        self._calm_until = 0.0
        self._on_taken: list[Taken] = []
        self._on_lost: list[Lost] = []
        self._on_change: list[Callable[[], None]] = []
        self._tasks: dict[int, set[asyncio.Future[None]]] = defaultdict(set)

    # -- for those who act -------------------------------------------------------------------------------------
    def of(self, key: str) -> int:
        """The shard of a run, or of an execution without one, by its id."""
        return self._core.records.shard_of(key)

    def may_write(self, shard: int) -> bool:
        """Whether the shard is surely ours at this moment."""
        return shard in self.held and is_safe(self._renewed.get(shard), steady_time())

    def on_taken(self, callback: Taken) -> None:
        """Called in a task of its own once a shard is held; cancelled when the shard goes meanwhile.

        Also when a lease had run out and nobody else has had the shard: what was not written in between may go on.
        """
        self._on_taken.append(callback)

    def on_lost(self, callback: Lost) -> None:
        """Called when a shard is no longer ours to act for. An orderly hand-over waits for what it returns."""
        self._on_lost.append(callback)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Called whenever `held` has changed."""
        self._on_change.append(callback)

    async def insist(self, step: Callable[[], Awaitable[T]], name: str) -> T:
        """Runs a step that writes, again while a server is away, and again without a shard that turns out lost."""
        while True:
            try:
                return await self._core.patiently(step, name)
            except ShardLost as error:
                await self.lose(error.shard)

    # -- leases ------------------------------------------------------------------------------------------------
    async def keep(self) -> None:
        """Renews what is ours; run it again and again."""
        await self._renew()
        await asyncio.sleep(RENEW_SECONDS)

    async def _renew(self) -> None:
        async with self._claiming:
            sent = steady_time()
            answers = await self._claim(sorted(self._renewed))
            unsure = [s for s, answer in answers.items() if answer == 1 and s in self.held]
            lost = [shard for shard, answer in answers.items() if answer == 0]
            self._renewed.update(dict.fromkeys(answers.keys() - {*unsure, *lost}, sent))
        for shard in lost:
            await self.lose(shard)
        if unsure:
            await self._make_sure(unsure, sent)

    async def _make_sure(self, shards: list[int], sent: float) -> None:
        """The leases had vanished: somebody may have had the shards in between, which the records tell."""
        found = await self._core.read(lambda conn: ledger.fences_of(conn, shards))
        for shard in shards:
            if found.get(shard) != self._core.memory.fences.get(shard):
                await self.lose(shard)
            elif shard in self._renewed:
                lapsed = not self.may_write(shard)
                self._renewed[shard] = sent
                if lapsed:
                    self._tell_taken(shard)

    async def _claim(self, shards: Iterable[int]) -> dict[int, int]:
        """2 for one that was ours, 1 for one that was free, 0 for one that is another's."""
        shards = list(shards)
        if not shards:
            return {}
        arguments = (self._me, int(LEASE_SECONDS * 1000), self._gone)
        async with self._core.dispatch.redis.pipeline(transaction=False) as pipe:
            for shard in shards:
                key = self._core.keys.shard(shard)
                pipe.execute_command("FCALL", "vh1_claim", 1, key, *arguments)
            answers: Any = await pipe.execute()
        return dict(zip(shards, answers, strict=True))

    # -- sharing -----------------------------------------------------------------------------------------------
    async def balance(self) -> None:
        """Takes what is free and gives away what is too much; run it again and again."""
        try:
            await self._share()
        except redis.RedisError:
            self._calm_until = steady_time() + CALM_SECONDS
            raise
        await asyncio.sleep(BALANCE_SECONDS)

    async def _share(self) -> None:
        if self._leaving:
            return
        living, holders = await self._look()
        share = share_out(self._me, living, holders)
        for shard in share.release:
            await self._release(shard)
            log.info("handed over shard %d", shard, extra={"action": "release-shard"})
        if steady_time() < self._calm_until:
            return
        # A claim whose answer was lost on its way is ours without our knowing.
        stray = [s for s, who in holders.items() if who == self._me and s not in self._renewed]
        await self._take([*share.take, *(set(stray) - set(share.release))])
        self._gone = ""

    async def _look(self) -> tuple[list[str], dict[int, str | None]]:
        core = self._core
        shards = range(core.records.shards)
        arguments = (self._me, int(LEASE_SECONDS * 1000), self._gone)
        async with core.dispatch.redis.pipeline(transaction=False) as pipe:
            pipe.execute_command("FCALL", "vh1_muster", 1, core.keys.conductors(), *arguments)
            pipe.mget([core.keys.shard(shard) for shard in shards])
            living, found = await pipe.execute()
        holders: dict[int, str | None] = dict(zip(shards, found, strict=True))
        for shard, holder in holders.items():
            if self._gone and holder and holder.startswith(self._gone):
                holders[shard] = None
        return living, holders

    async def _take(self, wanted: Iterable[int]) -> None:
        async with self._claiming:
            sent = steady_time()
            claimed = await self._claim(wanted)
            self._renewed.update({shard: sent for shard, answer in claimed.items() if answer})
        mine = [shard for shard in self._renewed if shard not in self.held]
        if not mine:
            return
        number = await self._core.take_over(mine, self._me)
        mine = [shard for shard in mine if shard in self._renewed]  # it may have taken long
        log.info(
            "looking after shards %s with %d unfinished executions",
            ", ".join(map(str, sorted(mine))),
            number,
            extra={"action": "take-shards"},
        )
        self._set_held(self.held | set(mine))
        for shard in mine:
            self._tell_taken(shard)

    async def _release(self, shard: int) -> None:
        """An orderly hand-over: nothing new is begun, what is in hand ends, then another may take it."""
        self._set_held(self.held - {shard})
        waits = self._tell_lost(shard)
        if waits:
            await asyncio.wait(waits, timeout=HANDOVER_SECONDS)
        await self._core.quiet()
        await self._core.forget_shard(shard)
        async with self._claiming:
            self._renewed.pop(shard, None)
            key = self._core.keys.shard(shard)
            await self._core.dispatch.redis.fcall("vh1_unclaim", 1, key, self._me)

    async def lose(self, shard: int) -> None:
        """Another conductor has it: its executions are forgotten here, the others go on."""
        self._renewed.pop(shard, None)
        if shard in self.held:
            text = "lost shard %d to another conductor"
            log.warning(text, shard, extra={"action": "lose-shard"})
            self._set_held(self.held - {shard})
            self._tell_lost(shard)
        await self._core.forget_shard(shard)

    async def release_all(self) -> None:
        """Hands everything over, and takes nothing any more."""
        self._leaving = True
        await asyncio.gather(*(self._release(shard) for shard in sorted(self._renewed)))
        await self._core.dispatch.redis.zrem(self._core.keys.conductors(), self._me)
        log.info("handed over all shards", extra={"action": "release-shard"})

    # -- callbacks ---------------------------------------------------------------------------------------------
    def _set_held(self, held: Iterable[int]) -> None:
        self.held = frozenset(held)
        for callback in self._on_change:
            callback()

    def _tell_taken(self, shard: int) -> None:
        for callback in self._on_taken:
            self._start(shard, callback(shard))

    def _tell_lost(self, shard: int) -> list[asyncio.Future[None]]:
        for task in self._tasks.pop(shard, set()):
            task.cancel()
        answers = [callback(shard) for callback in self._on_lost]
        return [self._start(shard, answer) for answer in answers if answer is not None]

    def _start(self, shard: int, work: Awaitable[None]) -> asyncio.Future[None]:
        task = asyncio.ensure_future(work)
        self._tasks[shard].add(task)
        task.add_done_callback(lambda done: self._ended(shard, done))
        return task

    def _ended(self, shard: int, task: asyncio.Future[None]) -> None:
        self._tasks[shard].discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("shard %d: %r", shard, error, exc_info=error, extra={"action": "fail"})
