"""One download: a stream, or ranges by several connections, into a file that nobody sees before it is whole."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from valohai_agent.errors import Refused
from valohai_agent.protocol import Checksums, Transfer
from valohai_agent.transfers.crew import Crew
from valohai_agent.transfers.disk import WriteBack
from valohai_agent.transfers.hashing import MAX_LAG_BYTES, Digests, Following, Ring, verify
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
from valohai_agent.transfers.versions import version_of_answer
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
        self._headers: Mapping[str, str] = {}
        self._position = 0
        self._digests = Digests(shared.algorithms)
        self._checksums: Checksums | None = None

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
        return Transferred(
            size=self._position,
            checksums=found,
            etag=self._etag,
            version=version_of_answer(self._headers, self._position),
        )

    # -- one connection ------------------------------------------------------------------------------
    def _attempt(self) -> None:
        """The whole file, or what is missing of it. One connection begins; when it is slow, others join it."""
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
            splittable = self._is_splittable(answer)
            if (self._total or 0) - self._position < SPLIT_BYTES or self._shared.crowded:
                alone = self._stream(answer, splittable)
            else:
                alone = self._stream_and_hash_behind(answer, splittable)
        if not alone:
            total = self._total or 0
            ranges = Ranges(total, start=self._position)
            self._checksums = Ranged(self, ranges).run()
            self._position = total

    def _wanted(self) -> dict[str, str]:
        if self._position and self._etag:
            return {"Range": f"bytes={self._position}-", "If-Range": self._etag}
        self._restart()
        return {}

    def _begin(self, answer: Answer, headers: dict[str, str]) -> None:
        """Understands the head of an answer; raises when there is nothing to read."""
        partial = answer.status == 206
        if headers and answer.status in (412, 416):
            raise Changed
        if not answer.ok or (partial and not headers):
            raise self.error(answer)
        etag = strong_etag(answer.headers)
        if partial and etag not in (None, self._etag):
            raise Changed
        if not partial:
            self._restart()
            self._etag, self._headers = etag, answer.headers
        span = content_range(answer.headers) if partial else None
        if span is not None and span[0] != self._position:
            raise Temporary("the server sent another range than was asked for")
        if answer.length is not None:
            self._total = answer.length + self._position
            self._count.total = self._total
            verify(self._name, self._total, Checksums(), self._size, Checksums())

    def _is_splittable(self, answer: Answer) -> bool:
        """Whether ranges of the same content can be asked for on other connections."""
        pinned = self._etag or any(self._expected.model_dump().values())
        can = answer.status == 206 or "bytes" in answer.headers.get("accept-ranges", "")
        return bool(pinned and can and self._total is not None)

    def _stream(self, answer: Answer, splittable: bool) -> bool:
        """Reads on; False when it is slow enough to be split."""
        view, pace = buffer(), _Pace(self, splittable)
        while count := answer.read_into(view):
            self._digests.update(view[:count])
            if self._write(view[:count], pace):
                return False
        self._require_all(answer)
        return True

    def _stream_and_hash_behind(self, answer: Answer, splittable: bool) -> bool:
        ring, pace = Ring(self._digests), _Pace(self, splittable)
        try:
            ended = slow = False
            while not ended and not slow:
                index, view = ring.take()
                have = 0
                try:
                    while have < len(view) and not ended:
                        count = answer.read_into(view[have:])
                        have, ended = have + count, not count
                finally:  # what came before the connection broke is kept
                    slow = self._write(view[:have], pace)
                    ring.give(index, have)
        finally:
            ring.close()
        if ended:
            self._require_all(answer)
        return ended

    def _write(self, data: memoryview, pace: _Pace) -> bool:
        write(self._fd, data, self._position)
        self._position += len(data)
        self._count.add(len(data))
        return pace.moved()

    def _require_all(self, answer: Answer) -> None:
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


class _Pace:
    """Looks at every RANGE_BYTES of a stream: hands them to the disk, and tells whether other connections should join."""

    def __init__(self, download: Download, splittable: bool) -> None:
        self._download, self._splittable = download, splittable
        self._from, self._since = download._position, time.monotonic()
        large = (download._total or SPLIT_BYTES) >= SPLIT_BYTES
        self._back = WriteBack(download._fd) if large else None

    def moved(self) -> bool:
        position = self._download._position
        if self._back is None or position - self._from < RANGE_BYTES:
            return False
        self._back.written(self._from, position)
        now = time.monotonic()
        slow = wants_company(moved=position - self._from, seconds=now - self._since)
        self._from, self._since = position, now
        left = (self._download._total or 0) - position
        return slow and self._splittable and left > RANGE_BYTES and self._download._shared.has_room


class Ranged:
    """The rest of a download by several connections, hashed behind them in order."""

    def __init__(self, download: Download, ranges: Ranges) -> None:
        self._download, self._ranges = download, ranges
        self._shared, self._fd = download._shared, download._fd
        self._source, self._etag = download._source, download._etag
        self._back = WriteBack(self._fd)
        self._back_lock, self._writing = threading.Lock(), threading.Lock()
        self._crew = Crew(self._shared, self._work)
        self._hashes = Following(self._fd, download._digests)

    def run(self) -> Checksums:
        try:
            self._crew.run()
            return self._hashes.finish()
        finally:
            self._hashes.close()

    def _work(self) -> None:
        self._crew.add()  # one was too slow
        while (taken := self._ranges.take()) is not None:
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
        view, have = buffer(), 0
        try:
            while have < taken.left:
                count = answer.read_into(view[have : taken.left])
                if not count:
                    raise Temporary(f"only {taken.position - taken.start} bytes of a range arrived")
                have += count
                if have == len(view):
                    self._write(view, taken)
                    have = 0
        finally:
            self._write(view[:have], taken)

    def _write(self, data: memoryview, taken: Range) -> None:
        """One thread at a time: the kernel lets only one write to a file, and makes the others spin."""
        with self._writing:
            write(self._fd, data, taken.position)
        taken.position += len(data)
        self._download._count.add(len(data))

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
