"""One upload by a single request, and what uploads in parts share with it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

from valohai_agent.errors import Conflict, Refused
from valohai_agent.local_files import Shrunk
from valohai_agent.protocol import Checksums, Transfer
from valohai_agent.transfers.hashing import Digests, Following
from valohai_agent.transfers.lane import SMALL_BYTES
from valohai_agent.transfers.pace import Count, Progress, Shared, Transferred
from valohai_agent.transfers.ranges import SPLIT_BYTES
from valohai_agent.transfers.retries import status_error
from valohai_agent.transfers.versions import version_of_file
from valohai_agent.transfers.wire import Answer, FileBody

READ_BYTES = 256 * 1024


class Source:
    """An open regular file that is hashed while it is sent, and must not change meanwhile."""

    def __init__(self, shared: Shared, fd: int, *, name: str, progress: Progress | None) -> None:
        self.shared, self.fd, self.name = shared, fd, name
        self._before = os.fstat(fd)
        self.size, self.version = self._before.st_size, version_of_file(self._before)
        self.count = Count(progress, self.size)
        self._digests = Digests(shared.algorithms)
        self._lock = threading.Lock()
        self._hashes: Following | None = None
        self._view: memoryview | None = None
        if self.size >= SPLIT_BYTES and not shared.crowded:
            self._hashes = Following(fd, self._digests)

    def close(self) -> None:
        if self._hashes is not None:
            self._hashes.close()

    def small(self) -> bytes:
        """The whole content."""
        data = os.pread(self.fd, self.size, 0)
        if len(data) != self.size:
            raise Shrunk(self.size - len(data))
        self._digests.update(data)
        return data

    def hash_until(self, end: int) -> None:
        """Bytes below `end` are on their way, so they are in memory: a good time to hash them."""
        if self._hashes is not None:
            self._hashes.advance(end)
            return
        with self._lock:
            while (position := self._digests.size) < end:
                if self._view is None:
                    self._view = memoryview(bytearray(READ_BYTES))
                count = os.preadv(self.fd, [self._view[: end - position]], position)
                if not count:
                    raise Shrunk(end - position)
                self._digests.update(self._view[:count])

    def wait_for_hashes(self, position: int, check: Callable[[], None]) -> None:
        if self._hashes is not None:
            self._hashes.wait_until(position, check)

    def finish(self, etag: str | None) -> Transferred:
        """The result, once everything is sent; raises Refused if the file was written meanwhile."""
        self.hash_until(self.size)
        found: Checksums = (
            self._hashes.finish() if self._hashes is not None else self._digests.checksums()
        )
        now = os.fstat(self.fd)
        if (now.st_size, now.st_mtime_ns) != (self._before.st_size, self._before.st_mtime_ns):
            raise Refused(
                f"{self.name}: the file changed while it was uploaded. "
                "Let the command end its writing before it ends, or before it makes the file read-only."
            )
        return Transferred(size=self.size, checksums=found, etag=etag)

    def error(self, answer: Answer, transfer: Transfer) -> Exception:
        host = urlsplit(transfer.url).hostname or ""
        body = answer.read(4096) if answer.status >= 400 else b""
        return status_error(answer.status, answer.reason, answer.headers, host, self.name, body)

    def require_granted_size(self, transfer: Transfer) -> None:
        """Raises Refused when the request is signed for another size than the file has by now."""
        signed = {key.lower(): value for key, value in transfer.headers.items()}
        if signed.get("content-length", str(self.size)) != str(self.size):
            raise Refused(
                f"{self.name}: the file has {self.size} bytes now, {signed['content-length']} when it was found. "
                "Let the command end its writing before it ends, or before it makes the file read-only."
            )


def put(source: Source, transfer: Transfer) -> Transferred:
    """Sends the file by one request."""
    source.require_granted_size(transfer)
    data = source.small() if source.size <= SMALL_BYTES else None
    tries = 0

    def attempt() -> str | None:
        nonlocal tries
        tries += 1
        source.count.restart()
        body = (
            data
            if data is not None
            else FileBody(fd=source.fd, offset=0, length=source.size, sent=sent)
        )
        pool, check = source.shared.pool, source.shared.check
        with pool.request(
            transfer.method, transfer, body=body, check=check, name=source.name
        ) as answer:
            if not answer.ok:
                error = source.error(answer, transfer)
                if isinstance(error, Conflict) and tries > 1:
                    # The key is fresh and ours alone: an earlier try arrived, only its answer was lost.
                    return None
                raise error
            answer.read()
            return answer.headers.get("etag")

    def sent(offset: int, count: int) -> None:
        source.count.add(count)
        source.hash_until(offset + count)

    etag = source.shared.retries(source.name).run(attempt)
    if data is not None:
        source.count.add(source.size)
    return source.finish(etag)
