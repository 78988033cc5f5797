"""One upload in parts: several connections for the stores that take parts in any order, one for a resumable session."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from xml.sax.saxutils import escape

from valohai_agent.errors import Conflict, NotFound, Refused
from valohai_agent.protocol import GRANTED_PARTS, Parts, Transfer, block_id
from valohai_agent.transfers.crew import Crew
from valohai_agent.transfers.hashing import MAX_LAG_BYTES
from valohai_agent.transfers.pace import Transferred
from valohai_agent.transfers.ranges import Range, Ranges, wants_company
from valohai_agent.transfers.retries import Temporary, status_error
from valohai_agent.transfers.upload import Source
from valohai_agent.transfers.wire import FileBody

More = Callable[[int, int], Parts]
"""Asks the control plane for `count` parts from number `first` on, with a fresh finish."""
PERSISTED = re.compile(r"bytes=0-(\d+)")


def put_parts(source: Source, parts: Parts, more: More | None) -> Transferred:
    """Sends the file in parts and finishes the upload: only then is anything to be seen in the store."""
    if parts.style == "session":
        return _Session(source, parts).run()
    return _Parallel(source, parts, more).run()


class _Granted:
    """The signed requests of the parts; asks for further ones and for fresh ones, many at a time."""

    def __init__(self, parts: Parts, more: More | None, last: int, name: str) -> None:
        self._parts, self._more, self._last, self._name = dict(parts.parts), more, last, name
        self.finish = parts.finish
        self._lock = threading.Lock()

    def part(self, number: int) -> Transfer:
        with self._lock:
            if number not in self._parts:
                self._ask(number)
            if number not in self._parts:
                raise Refused(f"{self._name}: the control plane granted no part {number}")
            return self._parts[number]

    def renewed(self, number: int, used: Transfer) -> bool:
        """Whether there is another request than `used` for the part by now."""
        with self._lock:
            if self._parts.get(number) is used:
                self._ask(number)
            return self._parts.get(number) is not used

    def finish_renewed(self, used: Transfer) -> bool:
        with self._lock:
            if self.finish is used:
                self._ask(self._last)
            return self.finish is not used

    def join(self) -> None:
        """All parts are stored: the control plane makes one object of them."""
        if self._more is None:
            raise Refused(f"{self._name}: nobody can join the parts of this upload")
        self._more(self._last + 1, 0)

    def _ask(self, number: int) -> None:
        if self._more is None:
            return
        fresh = self._more(number, min(GRANTED_PARTS, self._last - number + 1))
        self._parts.update(fresh.parts)
        self.finish = fresh.finish or self.finish


class _Parallel:
    """Parts in any order: S3, Azure blocks, Swift segments."""

    def __init__(self, source: Source, parts: Parts, more: More | None) -> None:
        self._source, self._style = source, parts.style
        self._part_bytes = parts.part_bytes
        self._ranges = Ranges(source.size, size=parts.part_bytes)
        self._last = max(1, -(-source.size // parts.part_bytes))
        self._granted = _Granted(parts, more, self._last, source.name)
        self._etags: dict[int, str] = {}
        self._crew = Crew(source.shared, self._work)

    def run(self) -> Transferred:
        self._crew.run()
        unchanged = self._source.finish(None)  # before anything becomes visible
        etag = self._finish()
        return Transferred(size=unchanged.size, checksums=unchanged.checksums, etag=etag)

    def _work(self) -> None:
        while (taken := self._ranges.take()) is not None:
            self._source.wait_for_hashes(taken.start - MAX_LAG_BYTES, self._crew.check)
            started = time.monotonic()
            self._send(taken)
            moved, seconds = taken.end - taken.start, time.monotonic() - started
            if self._ranges.waiting and wants_company(moved=moved, seconds=seconds, sending=True):
                self._crew.add()

    def _send(self, taken: Range) -> None:
        number = taken.start // self._part_bytes + 1
        used = self._granted.part(number)

        def attempt() -> None:
            nonlocal used
            used = self._granted.part(number)
            self._put(number, used, taken)

        self._source.shared.retries(self._source.name, self._crew.check).run(
            attempt, renew=lambda: self._granted.renewed(number, used)
        )

    def _put(self, number: int, transfer: Transfer, taken: Range) -> None:
        source, moved = self._source, 0

        def sent(offset: int, count: int) -> None:
            nonlocal moved
            moved += count
            source.count.add(count)
            taken.position = offset + count
            source.hash_until(self._ranges.whole_until)

        taken.position = taken.start
        body = FileBody(fd=source.fd, offset=taken.start, length=taken.left, sent=sent)
        try:
            with source.shared.pool.request(
                transfer.method, transfer, body=body, check=self._crew.check, name=source.name
            ) as answer:
                if not answer.ok:
                    raise source.error(answer, transfer)
                answer.read()
                self._etags[number] = answer.headers.get("etag", "")
        except BaseException:
            source.count.add(-moved)
            raise
        if self._style == "s3" and not self._etags[number]:
            raise Refused(f"{source.name}: the store gave part {number} no ETag")

    # -- the end -----------------------------------------------------------------------------------
    def _finish(self) -> str | None:
        if self._granted.finish is None:
            self._granted.join()
            return None
        used, unanswered = self._granted.finish, False
        body = self._list()

        def attempt() -> str | None:
            nonlocal used, unanswered
            used = self._granted.finish or used
            try:
                return self._ask_to_finish(used, body)
            except (NotFound, Conflict):
                if unanswered:  # an earlier try arrived, only its answer was lost
                    return None
                raise
            except Temporary:
                unanswered = True
                raise

        return self._source.shared.retries(self._source.name).run(
            attempt, renew=lambda: self._granted.finish_renewed(used)
        )

    def _ask_to_finish(self, transfer: Transfer, body: bytes) -> str | None:
        source = self._source
        with source.shared.pool.request(
            transfer.method,
            transfer,
            headers={"Content-Type": "application/xml"}
            if "content-type" not in {key.lower() for key in transfer.headers}
            else None,
            body=body,
            check=source.shared.check,
            name=source.name,
        ) as answer:
            if not answer.ok:
                raise source.error(answer, transfer)
            text = answer.read()
            if b"<Error>" in text:  # S3 begins its answer before it knows how it ends
                raise status_error(500, "", {}, "the store", source.name, text)
            return answer.headers.get("etag")

    def _list(self) -> bytes:
        numbers = range(1, self._last + 1)
        if self._style == "azure":
            items = "".join(f"<Latest>{block_id(number)}</Latest>" for number in numbers)
            return f'<?xml version="1.0" encoding="utf-8"?><BlockList>{items}</BlockList>'.encode()
        items = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(self._etags[number])}</ETag></Part>"
            for number in numbers
        )
        space = "http://s3.amazonaws.com/doc/2006-03-01/"
        return (
            f'<CompleteMultipartUpload xmlns="{space}">{items}</CompleteMultipartUpload>'.encode()
        )


class _Session:
    """Chunks in order to one resumable session, which knows how far it got."""

    def __init__(self, source: Source, parts: Parts) -> None:
        if 1 not in parts.parts:
            raise Refused(f"{source.name}: the control plane granted no session")
        self._source, self._part_bytes = source, parts.part_bytes
        self._session = parts.parts[1]
        self._position = 0
        self._done = False
        self._unsure = False
        self._etag: str | None = None

    def run(self) -> Transferred:
        self._source.shared.retries(self._source.name).run(
            self._attempt, progress=lambda: self._position
        )
        return self._source.finish(self._etag)

    def _attempt(self) -> None:
        if self._unsure:
            self._send(self._position, 0, f"bytes */{self._source.size}")
        self._unsure = True
        while not self._done:
            size = self._source.size
            count = min(self._part_bytes, size - self._position)
            last = self._position + count - 1
            wanted = f"bytes {self._position}-{last}/{size}" if count else f"bytes */{size}"
            before = self._position
            self._send(before, count, wanted)
            if not self._done and self._position <= before:
                raise Temporary("the session took nothing")

    def _send(self, offset: int, count: int, content_range: str) -> None:
        """Sends a chunk, or with `count` 0 asks how far the session is; learns it from the answer."""
        source = self._source
        body = (
            FileBody(fd=source.fd, offset=offset, length=count, sent=self._sent) if count else b""
        )
        with source.shared.pool.request(
            "PUT",
            self._session,
            headers={"Content-Range": content_range},
            body=body,
            check=source.shared.check,
            name=source.name,
        ) as answer:
            if answer.status == 308:
                found = PERSISTED.fullmatch(answer.headers.get("range", ""))
                self._moved_to(int(found.group(1)) + 1 if found else 0)
            elif answer.ok:
                self._done, self._etag = True, answer.headers.get("etag")
                self._moved_to(source.size)
            else:
                raise source.error(answer, self._session)
            answer.read()

    def _sent(self, offset: int, count: int) -> None:
        self._source.hash_until(offset + count)

    def _moved_to(self, position: int) -> None:
        self._source.count.add(position - self._position)
        self._position = position
