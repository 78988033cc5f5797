"""Turns the command's bytes into complete log files, live lines and metadata events (CONTRACT 7.1, 7.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from valohai_agent.protocol import LogLine


class ConsoleClock(Protocol):
    """What the console needs of a clock: aware UTC time, and seconds that never go back."""

    def now(self) -> datetime: ...

    def monotonic(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class LogFile:
    """One complete log on disk. `events` is gzip-compressed when the console closes."""

    path: Path
    size: int
    lines: int


class Console:
    """Safe to feed from several threads. `sink` and `on_metadata` are called while a lock is held, from the
    feeding thread: they must only queue. Call `tick()` about once a second, so that a line without its end (a
    progress bar, a prompt) and the gap markers become visible while nothing else is printed."""

    last_output_at: float
    """Monotonic time of the last byte on stdout or stderr (M-31); starts as the time of creation."""

    def __init__(
        self,
        log_dir: Path,
        sink: Callable[[list[LogLine]], None],
        on_metadata: Callable[[list[dict[str, Any]]], None],
        clock: ConsoleClock,
        secrets: Iterable[str] = (),
    ) -> None:
        raise NotImplementedError

    def add_secrets(self, secrets: Iterable[str]) -> None:
        """Masks these values from now on (K-74: exact values of six and more characters become `***`)."""
        raise NotImplementedError

    def feed(self, stream: str, data: bytes) -> None:
        """Takes raw bytes of `stdout` or `stderr` as they come."""
        raise NotImplementedError

    def status(self, message: str) -> None:
        """Writes a line of the platform; several lines when the message has newlines."""
        raise NotImplementedError

    def tick(self) -> None:
        """Shows what waits for the flush interval."""
        raise NotImplementedError

    def touch(self) -> None:
        """Restarts the silence measured by `last_output_at`, when the command starts."""
        raise NotImplementedError

    def tail(self, stream: str, lines: int = 20) -> list[str]:
        """Last lines of a stream, masked, for failure messages."""
        raise NotImplementedError

    def close(self) -> dict[str, LogFile]:
        """Ends unfinished lines, closes the files; gives them by name (stdout, stderr, events). Idempotent."""
        raise NotImplementedError
