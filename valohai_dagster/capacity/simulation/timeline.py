"""Time that passes only from one event to the next."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from datetime import datetime
from itertools import count

from valohai_dagster.capacity.simulation.scenario import at


class Timeline:
    """Events in order of their time, in seconds since the start; those of one time in the order they were planned."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def clock(self) -> datetime:
        return at(self.seconds)

    def plan(self, seconds: float, event: Callable[[], None]) -> None:
        """Not before now."""
        when = max(self.seconds, seconds)
        heapq.heappush(self._events, (when, next(self._numbers), event))

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        self.plan(self.seconds + seconds, event)

    def run(self, until: float, *, done: Callable[[], bool] = lambda: False) -> None:
        """Up to and including `until`, or till `done`."""
        while self._events and self._events[0][0] <= until and not done():
            self.seconds, _, event = heapq.heappop(self._events)
            event()
        if not done():
            self.seconds = max(self.seconds, until)
