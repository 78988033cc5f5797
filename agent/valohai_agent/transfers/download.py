"""One download: a stream, or ranges by several connections, into a file that nobody sees before it is whole."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from valohai_agent.errors import Refused
from valohai_agent.protocol import Checksums, Transfer
from valohai_agent.transfers.crew import Crew
from valohai_agent.transfers.disk import WriteBack
from valohai_agent.transfers.hashing import MAX_LAG_BYTES, Digests, Following, verify
from valohai_agent.transfers.pace import Count, Progress, Shared, Transferred
from valohai_agent.transfers.ranges import (
    RANGE_BYTES,
    SPLIT_BYTES,
    Range,
    Ranges,
    content_range,
    strong_etag,
    wants_company,
)
from valohai_agent.transfers.retries import Changed, Renewal, Temporary, status_error
from valohai_agent.transfers.wire import Answer

BUFFER_BYTES = (
    256 * 1024
)  # fits into a core's cache: what was received is hashed and written from there
RESTARTS = 3  # of a download whose content changed meanwhile
_own = threading.local()


class Download:
    """State of one download across its tries. `fd` is an empty file, open for reading and writing."""

    def __init__(
        self,
        shared: Shared,
        transfer: Transfer,
        fd: int,
        *,
        name: str,
        expected: Checksums | None,
        size: int | None,
        progress: Progress | None,
        renew: Callable[[], Transfer] | None,
    ) -> None:
        self._shared, self._fd, self._name = shared, fd, name
        self._expected, self._size = expected or Checksums(), size
        self._source = Renewal(transfer, renew)
        self._used = transfer
        self._count = Count(progress, size)
        self._total: int | None = None
        self._etag: str | None = None
        self._position = 0
        self._digests = Digests(shared.algorithms)
        self._checksums: Checksums | None = None
        self._whole = False  # ask for the whole at once: the server does not do ranges

    def run(self) -> Transferred:
        for _ in range(RESTARTS):
            try:
                self._shared.retries(self._name).run(
                    self._attempt,
                    progress=lambda: self._position,
                    renew=lambda: self._source.renewed(self._used),
                )
                break
            except Changed:
                self._restart()
        else:
            raise Refused(
                f"{self._name}: its content changed {RESTARTS} times while it was downloaded. "
                "Launch again when nobody writes it."
            )
        found = self._checksums or self._digests.checksums()
        verify(self._name, self._position, found, self._size, self._expected)
        return Transferred(size=self._position, checksums=found, etag=self._etag)

    # -- one connection ------------------------------------------------------------------------------
    def _attempt(self) -> None:
        """The whole file, or what is missing of it."""
        headers = self._wanted()
        self._used = self._source.current
        with self._shared.pool.request(
            self._used.method,
            self._used,
            headers=headers,
            check=self._shared.check,
            follow=True,
            name=self._name,
        ) as answer:
            self._begin(answer, headers)
            ranges = self._split(answer, headers)
            if ranges is None:
                self._stream(answer)
                return
            ranged = Ranged(self, ranges)
            ranged.first(answer)
        self._checksums = ranged.run()
        self._position = ranges.total

    def _wanted(self) -> dict[str, str]:
        if self._position and self._etag:
            return {"Range": f"bytes={self._position}-", "If-Range": self._etag}
        self._restart()
        if (self._size or 0) >= SPLIT_BYTES and not self._whole and not self._shared.crowded:
            return {"Range": f"bytes=0-{RANGE_BYTES - 1}"}
        return {}

    def _begin(self, answer: Answer, headers: dict[str, str]) -> None:
        """Understands the head of an answer; raises when there is nothing to read."""
        partial = answer.status == 206
        if answer.status == 416 and headers and not self._position:
            self._whole = True
            raise Temporary("the server knows no such range", 0.0)
        if not answer.ok or (partial and not headers):
            raise self.error(answer)
        etag = strong_etag(answer.headers)
        if partial and self._position and etag not in (None, self._etag):
            raise Changed
        if not partial and self._position:
            self._restart()
        self._etag = etag
        span = content_range(answer.headers) if partial else None
        if span is not None:
            if span[0] != self._position:
                raise Temporary("the server sent another range than was asked for")
            self._total = span[2]
        elif answer.length is not None:
            self._total = answer.length + self._position
        elif self._total is None:
            self._total = self._size
        if self._total is not None and answer.length is not None:
            verify(self._name, self._total, Checksums(), self._size, Checksums())
            self._count.total = self._total

    def _split(self, answer: Answer, headers: dict[str, str]) -> Ranges | None:
        """The ranges of the file if it should come by several connections."""
        if self._position or self._total is None:
            return None
        pinned = self._etag or any(self._expected.model_dump().values())
        if answer.status == 206:
            if content_range(answer.headers) is None or not pinned:
                self._whole = True
                raise Temporary("the server cannot be asked for ranges", 0.0)
            return Ranges(self._total)
        can = "bytes" in answer.headers.get("accept-ranges", "") and not headers
        if pinned and can and self._total >= SPLIT_BYTES and not self._shared.crowded:
            return Ranges(self._total)
        return None

    def _stream(self, answer: Answer) -> None:
        view, synced = buffer(), self._position
        back = WriteBack(self._fd) if (self._total or SPLIT_BYTES) >= SPLIT_BYTES else None
        while count := answer.read_into(view):
            self._shared.check()
            chunk = view[:count]
            self._digests.update(chunk)
            write(self._fd, chunk, self._position)
            self._position += count
            self._count.add(count)
            if back is not None and self._position - synced >= RANGE_BYTES:
                back.written(synced, self._position)
                synced = self._position
        if answer.length is not None and self._position != self._total:
            raise Temporary(f"only {self._position} of {self._total} bytes arrived")

    def _restart(self) -> None:
        if self._position or self._digests.size or self._count.done:
            os.ftruncate(self._fd, 0)
            self._digests = Digests(self._shared.algorithms)
            self._count.restart()
        self._position, self._etag, self._total = 0, None, None

    def error(self, answer: Answer) -> Exception:
        host = urlsplit(self._source.current.url).hostname or ""
        body = answer.read(4096) if answer.status >= 400 else b""
        return status_error(answer.status, answer.reason, answer.headers, host, self._name, body)


class Ranged:
    """The rest of a download by several connections, hashed behind them in order."""

    def __init__(self, download: Download, ranges: Ranges) -> None:
        self._download, self._ranges = download, ranges
        self._shared, self._fd = download._shared, download._fd
        self._source, self._etag = download._source, download._etag
        self._back = WriteBack(self._fd)
        self._back_lock = threading.Lock()
        self._taken: Range | None = ranges.take()
        self._crew = Crew(self._shared, self._work)
        self._hashes = Following(self._fd, self._shared.algorithms)

    def first(self, answer: Answer) -> None:
        """Reads the first range from the answer that the download began with."""
        try:
            if self._taken is not None:
                started, taken = time.monotonic(), self._taken
                self._read(answer, taken)
                self._taken = None
                self._complete(taken, time.monotonic() - started)
        except Temporary:
            pass  # its rest is asked for like any other range
        except BaseException:
            self._hashes.close()
            raise

    def run(self) -> Checksums:
        try:
            self._crew.run()
            return self._hashes.finish()
        finally:
            self._hashes.close()

    def _work(self) -> None:
        while True:
            taken, self._taken = self._taken or self._ranges.take(), None
            if taken is None:
                return
            self._hashes.wait_until(taken.start - MAX_LAG_BYTES, self._crew.check)
            self._fetch(taken)

    def _fetch(self, taken: Range) -> None:
        used = self._source.current
        started = time.monotonic()

        def attempt() -> None:
            nonlocal used
            used = self._source.current
            self._ask(used, taken)

        self._shared.retries(self._download._name, self._crew.check).run(
            attempt,
            progress=lambda: taken.position,
            renew=lambda: self._source.renewed(used),
        )
        self._complete(taken, time.monotonic() - started)

    def _ask(self, transfer: Transfer, taken: Range) -> None:
        headers = {"Range": f"bytes={taken.position}-{taken.end - 1}"}
        if self._etag:
            headers["If-Range"] = self._etag
        with self._shared.pool.request(
            transfer.method,
            transfer,
            headers=headers,
            check=self._crew.check,
            follow=True,
            name=self._download._name,
        ) as answer:
            if answer.status in (200, 412, 416):
                raise Changed
            if answer.status != 206:
                raise self._download.error(answer)
            span = content_range(answer.headers)
            if span is None or span[0] != taken.position:
                raise Temporary("the server sent another range than was asked for")
            if span[2] != self._ranges.total or strong_etag(answer.headers) != self._etag:
                raise Changed
            self._read(answer, taken)

    def _read(self, answer: Answer, taken: Range) -> None:
        view = buffer()
        while taken.left:
            count = answer.read_into(view[: taken.left])
            if not count:
                raise Temporary(f"only {taken.position - taken.start} bytes of a range arrived")
            self._crew.check()
            write(self._fd, view[:count], taken.position)
            taken.position += count
            self._download._count.add(count)

    def _complete(self, taken: Range, seconds: float) -> None:
        self._hashes.advance(self._ranges.whole_until)
        with self._back_lock:
            self._back.written(taken.start, taken.end)
        if self._ranges.waiting and wants_company(moved=taken.end - taken.start, seconds=seconds):
            self._crew.add()


def buffer() -> memoryview:
    """The calling thread's own, used for every file that it moves."""
    view = getattr(_own, "view", None)
    if view is None:
        view = _own.view = memoryview(bytearray(BUFFER_BYTES))
    return view


def write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
