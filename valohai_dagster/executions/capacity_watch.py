"""Which conductor looks after the machines of which group, and what makes it look at once.

Each group is leased in Redis by one conductor, like a shard; when that falls silent another takes over. An enqueue
anywhere reaches the holder within milliseconds: directly in the same process, else by a stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from valohai_dagster.capacity.left_behind import left_behind
from valohai_dagster.executions.capacity_group import GroupCapacity
from valohai_dagster.executions.capacity_state import KICKS_KEPT, CapacityState
from valohai_dagster.executions.capacity_tools import Tools
from valohai_dagster.executions.core import ServiceCore, cancel_all
from valohai_dagster.executions.identity import Identity
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.shards import RENEW_SECONDS, steady_time
from valohai_dagster.executions.share_out import LEASE_SECONDS, is_safe
from valohai_dagster.settings_groups import CloudGroupSettings

log = logging.getLogger(__name__)

BLOCK_MS = 2_000


class CapacityWatch:
    """`steps` in endless loops; `leave` before a conductor goes."""

    def __init__(self, core: ServiceCore, identity: Identity, tools: Tools) -> None:
        self.groups = {
            name: group
            for name, group in core.settings.groups.items()
            if isinstance(group, CloudGroupSettings)
        }
        self._core = core
        self._me = identity.name
        self._gone = identity.home  # an earlier conductor of this place has left its groups to us
        self._tools = tools
        self._renewed: dict[str, float] = {}  # ours, by the time when the renewal was sent
        self._looking: dict[str, tuple[GroupCapacity, asyncio.Future[None]]] = {}
        self._others: set[str] = set()  # groups of other conductors that have got jobs
        self._news = asyncio.Event()
        self._last: str | None = None
        self._leaving = False
        core.on_delivered(self._note)

    @property
    def steps(self) -> tuple[Callable[[], Awaitable[None]], ...]:
        """What is to be run in endless loops; nothing without groups of machines."""
        return (self.keep, self.listen, self.forward) if self.groups else ()

    @property
    def held(self) -> Collection[str]:
        """Groups that this conductor looks after."""
        return self._looking.keys()

    def states(self) -> dict[str, CapacityState]:
        """How the groups stood at the last look, of those that this conductor looks after."""
        found = {name: one.state for name, (one, _) in self._looking.items()}
        return {name: state for name, state in found.items() if state is not None}

    @property
    def busy(self) -> bool:
        """Whether there are machines that somebody has to look after."""
        return any(one.starting or one.states for one in self.states().values())

    async def look_behind(self) -> None:
        """Says once in the log which machines nobody looks after, as their groups were taken out of the settings."""
        for one in await self._core.read(lambda conn: left_behind(conn, self.groups)):
            extra = {"action": "left-behind", "group": one.group}
            log.warning("group %s: %s", one.group, one.trouble, extra=extra)

    # -- leases ------------------------------------------------------------------------------------------------
    async def keep(self) -> None:
        """Renews what is ours and takes what is free; run it again and again."""
        if not self._leaving:
            await self._claim()
        await asyncio.sleep(RENEW_SECONDS)

    async def _claim(self) -> None:
        sent = steady_time()
        arguments = (self._me, int(LEASE_SECONDS * 1000), self._gone)
        async with self._core.dispatch.redis.pipeline(transaction=False) as pipe:
            for name in self.groups:
                key = self._core.keys.supervisor(name)
                pipe.execute_command("FCALL", "vh1_claim", 1, key, *arguments)
            answers: Any = await pipe.execute()
        self._gone = ""
        for name, answer in zip(self.groups, answers, strict=True):
            if answer:
                self._renewed[name] = sent
                self._begin(name)
            else:
                self._renewed.pop(name, None)
                await self._end(name, "another conductor looks after the machines of group %s")

    def _begin(self, name: str) -> None:
        if name in self._looking:
            return
        group = GroupCapacity(
            self._core,
            name,
            self.groups[name],
            self._tools,
            lambda: is_safe(self._renewed.get(name), steady_time()),
        )
        task = asyncio.ensure_future(group.run())
        self._looking[name] = (group, task)
        task.add_done_callback(lambda done: self._ended(name, done))
        text = "looking after the machines of group %s"
        log.info(text, name, extra={"action": "take-group", "group": name})

    async def _end(self, name: str, text: str) -> None:
        if name in self._looking:
            group, task = self._looking.pop(name)
            await cancel_all([task])
            group.close()
            log.info(text, name, extra={"action": "lose-group", "group": name})

    def _ended(self, name: str, task: asyncio.Future[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("group %s: %r", name, error, exc_info=error, extra={"action": "fail"})
            if name in self._looking:  # begun anew with the next renewal
                self._looking.pop(name)[0].close()

    async def leave(self) -> None:
        """Ends in order; another conductor may take the groups at once."""
        self._leaving = True
        for name in list(self._looking):
            await self._end(name, "left the machines of group %s to the next conductor")
        for name in self._renewed:
            key = self._core.keys.supervisor(name)
            await self._core.dispatch.redis.fcall("vh1_unclaim", 1, key, self._me)
        self._renewed.clear()

    def close(self) -> None:
        """Ends whatever an orderly end has not."""
        for group, task in self._looking.values():
            task.cancel()
            group.close()
        self._looking.clear()

    # -- news --------------------------------------------------------------------------------------------------
    def kick(self, name: str) -> None:
        """Has the group looked at now, wherever it is looked after."""
        if name in self._looking:
            self._looking[name][0].kick()
        elif name in self.groups:
            self._others.add(name)
            self._news.set()

    def _note(self, outbox: Outbox) -> None:
        for name in {*outbox.queued, *(group for group, _, _ in outbox.ended)}:
            self.kick(name)

    async def forward(self) -> None:
        """Tells other conductors of news for their groups."""
        await self._news.wait()
        self._news.clear()
        others, self._others = self._others, set()
        stream = self._core.keys.kicks()
        async with self._core.dispatch.redis.pipeline(transaction=False) as pipe:
            for name in others:
                pipe.xadd(stream, {"group": name}, maxlen=KICKS_KEPT)
            await pipe.execute()

    async def listen(self) -> None:
        """Waits for what others tell. What is missed in an outage is seen at the next look anyway."""
        stream, redis = self._core.keys.kicks(), self._core.dispatch.redis
        last = self._last
        if last is None:
            newest: Any = await redis.xrevrange(stream, count=1)
            last = str(newest[0][0]) if newest else "0-0"
        reply: Any = await redis.xread({stream: last}, block=BLOCK_MS)
        entries = reply[0][1] if reply else []
        for _, fields in entries:
            if fields.get("group") in self._looking:
                group, _ = self._looking[fields["group"]]
                group.kick(retry=bool(fields.get("retry")))
        self._last = entries[-1][0] if entries else last
