"""A first-in-first-out queue of texts that moves to disk when it grows: what an agent holds back while Redis is away."""

from __future__ import annotations

import logging
import tempfile
from collections import deque
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

MEMORY_BYTES = 4 * 1024 * 1024  # per execution


class Spool:
    """Not safe for several threads: its owner holds a lock.

    Once the memory is full everything new goes to one anonymous file, until that is read to its end. The file has no
    name, so it is gone with the process, as its content would be useless to another attempt.
    """

    def __init__(self, directory: Path | None, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._head: deque[str] = deque()
        self._head_bytes = 0
        self._file: IO[bytes] | None = None
        self._read_at = 0
        self._on_disk = 0

    def __len__(self) -> int:
        return len(self._head) + self._on_disk

    def append(self, text: str) -> None:
        """Puts one text, without newlines (JSON), at the end."""
        full = self._head_bytes + len(text) > self._memory_bytes
        if (self._on_disk or full) and self._write(text):
            return
        self._head.append(text)
        self._head_bytes += len(text)

    def peek(self) -> str | None:
        """The oldest text; None when empty."""
        if not self._head and self._on_disk:
            self._load()
        return self._head[0] if self._head else None

    def pop(self) -> None:
        """Removes what `peek` gave."""
        self._head_bytes -= len(self._head.popleft())

    def clear(self) -> None:
        self._head.clear()
        self._head_bytes = 0
        self._on_disk = 0
        self._discard_file()

    def _write(self, text: str) -> bool:
        if self._directory is None:
            return False
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115
            end = self._file.seek(0, 2)
            data = text.encode() + b"\n"
            if self._file.write(data) != len(data):
                self._file.truncate(end)
                return False
        except OSError as exc:
            text = "cannot spool reports to %s: %s; keeping them in memory"
            logger.warning(text, self._directory, exc, extra={"action": "spool"})
            return self._on_disk > 0 and self._keep_order(text)
        self._on_disk += 1
        return True

    def _keep_order(self, text: str) -> bool:
        """The disk filled up behind earlier texts: take them all back into memory, then the new one."""
        while self._on_disk:
            self._load()
        self._head.append(text)
        self._head_bytes += len(text)
        return True

    def _load(self) -> None:
        """Moves the next stretch of the file into memory."""
        if self._file is None:
            raise RuntimeError("texts are counted on disk, but there is no file")
        self._file.seek(self._read_at)
        data = self._file.read(1024 * 1024)
        while not data.endswith(b"\n"):
            more = self._file.read(1024 * 1024)
            cut = more.find(b"\n") + 1
            data += more[:cut] if cut else more
            if not more:
                break
        self._read_at += len(data)
        for line in data.removesuffix(b"\n").split(b"\n"):
            self._head.append(line.decode())
            self._head_bytes += len(line)
            self._on_disk -= 1
        if self._on_disk <= 0:
            self._on_disk = 0
            self._discard_file()

    def _discard_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._read_at = None, 0
