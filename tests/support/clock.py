"""A clock that stands still until a test moves it."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

START = datetime(2026, 1, 5, 12, 0, tzinfo=timezone.utc)


class FakeClock:
    """Wall time and monotonic time that advance together; `sleep` advances instead of waiting.

    >>> clock = FakeClock(); clock.advance(2.5); clock.monotonic()
    2.5
    """

    def __init__(self, start: datetime = START) -> None:
        self._start = start
        self._elapsed = 0.0
        self.slept: list[float] = []

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._elapsed)

    def __call__(self) -> datetime:
        return self.now()

    def monotonic(self) -> float:
        return self._elapsed

    def time(self) -> float:
        return self.now().timestamp()

    def advance(self, seconds: float) -> None:
        self._elapsed += seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.advance(seconds)
