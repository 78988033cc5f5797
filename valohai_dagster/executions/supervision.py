"""Which conductor looks after the local groups, and when it does."""

from __future__ import annotations

import asyncio

from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.executions.local_groups import LocalGroups
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.seat import Seat

LOOK_SECONDS = 1.0


class Supervision:
    """`step` in an endless loop: a look at all groups every second, and at one at once when its queue has changed."""

    def __init__(self, core: ServiceCore, groups: LocalGroups, seat: Seat) -> None:
        self._groups = groups
        self._seat = seat
        self._changed: set[str] = set()
        self._news = asyncio.Event()
        core.on_delivered(self._note)

    def _note(self, outbox: Outbox) -> None:
        changed = {*outbox.queued, *(group for group, _, _ in outbox.ended)} & self._groups.keys()
        if changed:
            self._changed |= changed
            self._news.set()

    async def step(self) -> None:
        if self._groups and await self._seat.keep():
            await self._groups.reconcile_all()
        loop = asyncio.get_running_loop()
        end = loop.time() + LOOK_SECONDS
        while (left := end - loop.time()) > 0 and await self._news_within(left):
            changed, self._changed = self._changed, set()
            if self._seat.held:
                for name in sorted(changed):
                    await self._groups.reconcile(name)

    async def look(self) -> None:
        if self._seat.held:
            await self._groups.reconcile_all()

    async def _news_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        self._news.clear()
        return True
