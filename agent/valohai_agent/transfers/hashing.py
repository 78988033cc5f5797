"""Checksums while the bytes move: in the moving thread for one stream, in threads of their own behind many.

hashlib gives up the interpreter's lock while it works, so a thread per algorithm uses another core. Such threads read
the file itself (what was just written is in memory) as far as it is whole from its beginning.
"""

from __future__ import annotations

import hashlib
import os
import threading
from queue import SimpleQueue
from typing import Any

from valohai_agent.errors import ChecksumMismatch
from valohai_agent.local_files import Shrunk
from valohai_agent.protocol import Checksums

ALGORITHMS = ("sha256", "sha1", "md5")
RING_BUFFERS = 4
RING_BYTES = (
    1024 * 1024
)  # of each buffer; smaller ones cost more calls than they save memory traffic
READ_BYTES = 512 * 1024  # fits into a core's cache, so that reading is not paid twice
STEP_BYTES = 1024 * 1024  # threads are woken for no less, but at the end
MAX_LAG_BYTES = (
    256 * 1024 * 1024
)  # movers wait when hashing is further behind: it would read from the disk again


class Digests:
    """The digests of one stream, with its length."""

    def __init__(self, algorithms: tuple[str, ...] = ALGORITHMS) -> None:
        self.size = 0
        self._hashes: dict[str, Any] = {
            name: hashlib.new(name, usedforsecurity=False) for name in algorithms
        }

    def update(self, data: bytes | memoryview) -> None:
        self.size += len(data)
        for digest in self._hashes.values():
            digest.update(data)

    def split(self) -> dict[str, Digests]:
        """One for each algorithm, to go on with in threads of their own."""
        parts = {}
        for name, digest in self._hashes.items():
            part = parts[name] = Digests(())
            part.size, part._hashes = self.size, {name: digest}
        return parts

    def checksums(self) -> Checksums:
        return Checksums(**{name: digest.hexdigest() for name, digest in self._hashes.items()})


class Ring:
    """Buffers of a stream that are hashed behind it while they are still in a core's cache.

    The stream takes an empty buffer, fills and writes it, and gives it on; it waits when all are in use, so that memory
    stays bounded.
    """

    def __init__(self, digests: Digests) -> None:
        self._digests = digests
        self._views = [memoryview(bytearray(RING_BYTES)) for _ in range(RING_BUFFERS)]
        self._pending = [0] * RING_BUFFERS
        self._lock = threading.Lock()
        self._free: SimpleQueue[int] = SimpleQueue()
        for index in range(RING_BUFFERS):
            self._free.put(index)
        self._queues: list[SimpleQueue[tuple[int, int] | None]] = []
        self._threads = []
        for name, digest in digests.split().items():
            queue: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
            self._queues.append(queue)
            thread = threading.Thread(
                target=self._hash, args=(digest, queue), name=f"hash-{name}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def take(self) -> tuple[int, memoryview]:
        index = self._free.get()
        return index, self._views[index]

    def give(self, index: int, count: int) -> None:
        self._digests.size += count
        if not self._queues:
            self._free.put(index)
            return
        self._pending[index] = len(self._queues)
        for queue in self._queues:
            queue.put((index, count))

    def close(self) -> None:
        """Waits until all that was given is hashed; the digests are whole then."""
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()
        self._queues, self._threads = [], []

    def _hash(self, digest: Digests, queue: SimpleQueue[tuple[int, int] | None]) -> None:
        while (item := queue.get()) is not None:
            index, count = item
            digest.update(self._views[index][:count])
            with self._lock:
                self._pending[index] -= 1
                done = not self._pending[index]
            if done:
                self._free.put(index)


class Following:
    """Digests of a file that others write or send, in threads that follow as far as they are allowed."""

    def __init__(self, fd: int, digests: Digests) -> None:
        self._fd = fd
        self._changed = threading.Condition()
        self._limit = 0
        self._ended = False
        self._error: Exception | None = None
        self._digests = digests.split()
        self._threads = [
            threading.Thread(target=self._follow, args=(digest,), name=f"hash-{name}", daemon=True)
            for name, digest in self._digests.items()
        ]
        for thread in self._threads:
            thread.start()

    def advance(self, limit: int) -> None:
        """All bytes below `limit` may be read now."""
        with self._changed:
            if limit > self._limit:
                self._limit = limit
                self._changed.notify_all()

    @property
    def behind(self) -> int:
        """Up to where the slowest has come."""
        return min((digest.size for digest in self._digests.values()), default=1 << 62)

    def wait_until(self, position: int, check: Any) -> None:
        """Blocks while hashing is not as far as `position`."""
        while self.behind < position and self._error is None:
            check()
            with self._changed:
                self._changed.wait(0.05)

    def finish(self) -> Checksums:
        """Waits for the rest, all of which may be read."""
        self.close(abandon=False)
        if self._error is not None:
            raise self._error
        found = Checksums()
        for name, digest in self._digests.items():
            found = found.model_copy(update={name: getattr(digest.checksums(), name)})
        return found

    def close(self, *, abandon: bool = True) -> None:
        with self._changed:
            self._ended = True
            if abandon:
                self._limit = 0
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _follow(self, digest: Digests) -> None:
        view = memoryview(bytearray(READ_BYTES))
        try:
            while limit := self._next(digest.size):
                while digest.size < limit:
                    count = os.preadv(
                        self._fd, [view[: min(READ_BYTES, limit - digest.size)]], digest.size
                    )
                    if not count:
                        raise Shrunk(limit - digest.size)
                    digest.update(view[:count])
        except OSError as error:
            self._error = error

    def _next(self, position: int) -> int:
        """The next limit to read to, 0 at the end."""
        with self._changed:
            while not self._ended and self._limit < position + STEP_BYTES:
                self._changed.wait()
            return self._limit if self._limit > position else 0


def verify(
    name: str, size: int, found: Checksums, wanted_size: int | None, wanted: Checksums
) -> None:
    """Raises ChecksumMismatch, naming both."""
    if wanted_size is not None and size != wanted_size:
        raise ChecksumMismatch(
            f"{name}: has {size} bytes, expected {wanted_size}. "
            "The source changed since it was recorded; use the new version explicitly."
        )
    for kind in ALGORITHMS:
        expected, actual = getattr(wanted, kind), getattr(found, kind)
        if expected and actual and expected.lower() != actual:
            raise ChecksumMismatch(
                f"{name}: has {kind} {actual}, expected {expected}. "
                "The source changed or was damaged on the way."
            )
