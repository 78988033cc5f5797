"""Workers whose death somebody has seen for sure, told to every conductor.

A supervisor knows its agents on its own host; their executions may be in the hands of another conductor.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from valohai_dagster.executions.core import ServiceCore

KEPT = 1_000  # deaths that a conductor can still learn of when it starts
BLOCK_MS = 2_000


class Deaths:
    """`read` in an endless loop."""

    def __init__(
        self,
        core: ServiceCore,
        on_deaths: Callable[[Mapping[tuple[str, str], str]], Awaitable[None]],
    ) -> None:
        """`on_deaths` is called with how each worker (group, name) died."""
        self._core = core
        self._on_deaths = on_deaths
        self._known: dict[tuple[str, str], None] = {}
        self._last = "0-0"

    async def announce(self, group: str, worker: str, what: str) -> None:
        entry: dict[Any, Any] = {"group": group, "worker": worker, "what": what}
        await self._core.dispatch.redis.xadd(self._core.keys.deaths(), entry, maxlen=KEPT)

    def is_known(self, group: str, worker: str) -> bool:
        return (group, worker) in self._known

    def note(self, group: str, worker: str) -> None:
        self._known[group, worker] = None
        while len(self._known) > KEPT:
            del self._known[next(iter(self._known))]

    async def read(self) -> None:
        """Waits for news. After an outage everything is read again; a death that is known is not told twice."""
        stream = self._core.keys.deaths()
        reply: Any = await self._core.dispatch.redis.xread({stream: self._last}, block=BLOCK_MS)
        entries = reply[0][1] if reply else []
        deaths = {(fields["group"], fields["worker"]): fields["what"] for _, fields in entries}
        new = {worker: what for worker, what in deaths.items() if worker not in self._known}
        if new:
            await self._on_deaths(new)
        for group, worker in new:
            self.note(group, worker)
        self._last = entries[-1][0] if entries else self._last
