"""What the files of one transferer share: cancellation, retries, places for connections, and paced progress."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from valohai_agent.errors import Unreachable
from valohai_agent.protocol import Checksums
from valohai_agent.transfers.hashing import ALGORITHMS
from valohai_agent.transfers.pool import Pool
from valohai_agent.transfers.retries import Retries
from valohai_agent.transfers.versions import Version

PROGRESS_SECONDS = 0.25
MAX_CONNECTIONS = 16  # of one transferer, beyond one per file
MOST_PER_FILE = 8  # connections of one file
Progress = Callable[[int, "int | None"], None]
"""Called with bytes done and bytes expected, at most a few times a second."""


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """What went over the wire. `version`: what the source of a download calls the content that it sent."""

    size: int
    checksums: Checksums
    etag: str | None = None
    version: Version = field(default_factory=Version)


class Shared:
    """Lives as long as the transferer; safe for several threads."""

    def __init__(
        self,
        pool: Pool,
        *,
        attempts: int,
        sleep: Callable[[float], Any],
        cancelled: threading.Event,
        algorithms: tuple[str, ...] = ALGORITHMS,
        max_connections: int = MAX_CONNECTIONS,
        waiting: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.pool = pool
        self.waiting = waiting
        self.algorithms = algorithms
        self._attempts, self._sleep, self._cancelled = attempts, sleep, cancelled
        self._max_connections = max_connections
        self.lanes_rest_until = 0.0  # time.monotonic()
        self._lock = threading.Lock()
        self._files = 0
        self._helpers = 0

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def check(self) -> None:
        if self.cancelled:
            raise Unreachable("cancelled")

    def retries(self, name: str, check: Callable[[], None] | None = None) -> Retries:
        return Retries(
            attempts=self._attempts,
            sleep=self._sleep,
            check=check or self.check,
            name=name,
            waiting=self.waiting,
            gave_up=self.pool.give_up,
        )

    # -- places for connections ----------------------------------------------------------------------
    @contextlib.contextmanager
    def file(self) -> Iterator[None]:
        """One file is on its way."""
        with self._lock:
            self._files += 1
        try:
            yield
        finally:
            with self._lock:
                self._files -= 1

    @property
    def crowded(self) -> bool:
        """Whether so many files are on their way that each does best with one connection."""
        return self._files * 2 > self._max_connections

    @property
    def has_room(self) -> bool:
        return self._files + self._helpers < self._max_connections

    def take_helper(self) -> bool:
        """Takes the place of a further connection, if one is free."""
        with self._lock:
            if self._files + self._helpers >= self._max_connections:
                return False
            self._helpers += 1
            return True

    def give_helper_back(self) -> None:
        with self._lock:
            self._helpers -= 1


class Count:
    """Bytes done of one file, told by several threads."""

    def __init__(self, progress: Progress | None, total: int | None = None) -> None:
        self.done = 0
        self.total = total
        self._progress = progress
        self._lock = threading.Lock()
        self._last = 0.0

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
            now = time.monotonic()
            told = self._progress is not None and (
                now - self._last >= PROGRESS_SECONDS or self.done == self.total
            )
            if told:
                self._last = now
            done = self.done
        if told and self._progress is not None:
            self._progress(done, self.total)

    def restart(self) -> None:
        with self._lock:
            self.done = 0
