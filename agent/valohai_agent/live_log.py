"""Publishes live log lines without ever making the command wait for Redis.

The complete log is on disk (console.py); this is only the window that people look through. While Redis is away the
newest lines are kept and a gap marker tells how many were left out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

from valohai_agent.protocol import LIVE_LOG_LINES, LogLine, LogStream
from valohai_agent.redis_link import RedisLink

STREAM_LINES = LIVE_LOG_LINES * len(LogStream)
STREAM_BYTES = 8 * 1024 * 1024  # what one attempt's live view may hold in Redis
GATHER_SECONDS = 0.05  # lines are sent in batches this far apart; after a silence at once
BATCH_LINES = 500
EXPIRE_SECONDS = 24 * 3600
EXPIRE_EVERY_SECONDS = 600.0


class Window:
    """How many of the newest lines fit into the byte limit of the stream."""

    def __init__(self, *, lines: int = STREAM_LINES, limit_bytes: int = STREAM_BYTES) -> None:
        self._sizes: deque[int] = deque()
        self._total = 0
        self._lines, self._limit_bytes = lines, limit_bytes

    def add(self, line: LogLine) -> int:
        """Counts a line in; gives the length to trim the stream to."""
        size = len(line.m) + 100
        self._sizes.append(size)
        self._total += size
        while len(self._sizes) > 1 and (
            len(self._sizes) > self._lines or self._total > self._limit_bytes
        ):
            self._total -= self._sizes.popleft()
        return len(self._sizes)


@dataclass
class _Gap:
    lines: int = 0
    last: LogLine | None = None


class LiveLog:
    """The live window of one attempt; `put` only queues."""

    def __init__(self, link: RedisLink, key: str, *, queue_lines: int = STREAM_LINES) -> None:
        self._link, self._key = link, key
        self._queue: deque[LogLine] = deque()
        self._queue_lines = queue_lines
        self._gaps: dict[LogStream, _Gap] = {}
        self._changed = threading.Condition()
        self._window = Window()
        self._closing = False
        self._gave_up = threading.Event()
        self._busy = False
        self._sent_at = float("-inf")
        self._expire_at = 0.0
        self._thread = threading.Thread(target=self._run, name="live-log", daemon=True)
        self._thread.start()

    def put(self, lines: list[LogLine]) -> None:
        with self._changed:
            self._queue.extend(lines)
            while len(self._queue) > self._queue_lines:
                self._leave_out(self._queue.popleft())
            self._changed.notify_all()

    def close(self, timeout: float = 5.0) -> None:
        """Sends what waits, for at most `timeout` seconds; the stored log has it all anyway."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._queue or self._busy), timeout)
        self._gave_up.set()

    def _leave_out(self, line: LogLine) -> None:
        gap = self._gaps.setdefault(line.s, _Gap())
        gap.lines += line.g or 1
        gap.last = line

    def _take_batch(self) -> list[LogLine]:
        """Waits for lines; an empty batch means closed and done."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            pause = self._sent_at + GATHER_SECONDS - time.monotonic()
            if pause > 0:
                self._changed.wait_for(lambda: self._closing, pause)
            batch = [_marker(gap) for gap in self._gaps.values()]
            self._gaps.clear()
            while self._queue and len(batch) < BATCH_LINES:
                batch.append(self._queue.popleft())
            self._busy = bool(batch)
            return batch

    def _run(self) -> None:
        while batch := self._take_batch():
            trims = [self._window.add(line) for line in batch]
            self._link.persist(
                lambda batch=batch, trim=trims[-1]: self._send(batch, trim),
                give_up=self._gave_up.is_set,
                wake=self._gave_up,
            )
            with self._changed:
                self._busy, self._sent_at = False, time.monotonic()
                self._changed.notify_all()
            if self._gave_up.is_set():
                return

    def _send(self, batch: list[LogLine], trim: int) -> None:
        """A repeated batch after a broken connection shows lines twice; readers tell by their offsets."""
        pipeline = self._link.client.pipeline(transaction=False)
        for line in batch:
            pipeline.xadd(self._key, _fields(line), maxlen=trim, approximate=True)
        now = time.monotonic()
        due = now >= self._expire_at
        if due:
            pipeline.expire(self._key, EXPIRE_SECONDS)
        pipeline.execute()
        if due:
            self._expire_at = now + EXPIRE_EVERY_SECONDS


def _fields(line: LogLine) -> dict[str, str | int]:
    fields: dict[str, str | int] = {
        "s": line.s.value,
        "t": line.t,
        "m": line.m,
        "o": line.o,
        "e": line.e,
    }
    return {**fields, "g": line.g} if line.g else fields


def _marker(gap: _Gap) -> LogLine:
    """Says that lines are missing here; its offsets end where the newest missing line ended."""
    last = gap.last
    if last is None:
        raise ValueError("a gap without lines")
    text = f"{gap.lines} lines are not shown here because Redis was away; the stored log has them."
    return LogLine(s=last.s, t=last.t, m=text, o=last.o, e=last.e, g=gap.lines)
