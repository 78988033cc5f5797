"""Which bytes are asked for: ranges in order, and how many connections they are worth. Decides; does nothing."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

RANGE_BYTES = 8 * 1024 * 1024
SPLIT_BYTES = 32 * 1024 * 1024  # below that one connection reads the whole file
FAST_BYTES_PER_SECOND = 150e6  # a connection of this speed needs no company
FAST_UPLOAD_BYTES_PER_SECOND = (
    600e6  # company costs an upload nothing: its file is there to be read
)
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass
class Range:
    """Bytes `start` to `end` (exclusive), of which those before `position` are there."""

    start: int
    end: int
    position: int

    @property
    def left(self) -> int:
        return self.end - self.position


class Ranges:
    """Hands out the ranges of one file in order, and knows up to where the file is whole. Safe for several threads."""

    def __init__(self, total: int, *, start: int = 0, size: int = RANGE_BYTES) -> None:
        self.total = total
        self._size = size
        self._next = start
        self._open: deque[Range] = deque()
        self._lock = threading.Lock()

    def take(self) -> Range | None:
        with self._lock:
            if self._next >= self.total:
                return None
            start, self._next = self._next, min(self.total, self._next + self._size)
            taken = Range(start, self._next, start)
            self._open.append(taken)
            return taken

    @property
    def waiting(self) -> bool:
        """Whether there are ranges that nobody took."""
        return self._next < self.total

    @property
    def whole_until(self) -> int:
        """All bytes below are there."""
        with self._lock:
            while self._open and self._open[0].left == 0:
                self._open.popleft()
            return self._open[0].position if self._open else self._next


def content_range(headers: Mapping[str, str]) -> tuple[int, int, int] | None:
    """First byte, byte after the last one, and size of the whole, of a 206 answer."""
    found = CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
    if found is None:
        return None
    first, last, total = (int(part) for part in found.groups())
    return first, last + 1, total


def strong_etag(headers: Mapping[str, str]) -> str | None:
    etag = headers.get("etag")
    return etag if etag and not etag.startswith("W/") else None


def identity(headers: Mapping[str, str]) -> str | None:
    """What names this content: strong ETag, else Last-Modified with the length."""
    etag = strong_etag(headers)
    if etag:
        return etag
    modified = headers.get("last-modified")
    return f"{modified}|{headers.get('content-length', '')}" if modified else None


def wants_company(*, moved: int, seconds: float, sending: bool = False) -> bool:
    """Whether a connection was so slow that a further one is likely to add speed."""
    fast = max(FAST_BYTES_PER_SECOND, FAST_UPLOAD_BYTES_PER_SECOND * sending)
    return moved > 0 and moved < fast * seconds
