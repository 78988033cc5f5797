"""One HTTP/1.1 connection: a lean reader and writer on a socket, made for moving files.

Bytes go from the socket into the caller's buffer and from a file into the socket without a detour where that can be.
Waiting happens in short slices, between which `check` may end it. URLs never appear in errors.
"""

from __future__ import annotations

import os
import re
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from valohai_agent.local_files import Shrunk
from valohai_agent.transfers.retries import Silent, Temporary

STATUS = re.compile(r"[0-9]{3}")
LENGTH = re.compile(r"[0-9]{1,18}")
CHUNK = re.compile(rb"\s*([0-9A-Fa-f]{1,15})\s*(?:;|$)")
BUFFER_BYTES = (
    128 * 1024
)  # a longer head of an answer is not HTTP; a small file comes with its head in one piece
SLICE_SECONDS = 0.25  # how late a cancellation is noticed
SEND_BYTES = 1024 * 1024  # of one sendfile call, between two looks at progress
BROKE_OFF = "the connection cannot be made or broke off"


class Stale(Temporary):
    """A kept connection turned out to be closed before anything was answered: another one is worth a try at once."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, 0.0)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a connection may take. Below `bytes_per_second` on average of `window_seconds` it counts as stuck."""

    connect_seconds: float = 10.0
    answer_seconds: float = 30.0  # to what is asked of a server first, while it has never answered
    read_seconds: float = 60.0
    window_seconds: float = 60.0
    bytes_per_second: float = 1024.0


@dataclass(frozen=True, kw_only=True)
class FileBody:
    """A range of an open file as body of a request. `sent(offset, count)` is told after each piece."""

    fd: int
    offset: int
    length: int
    sent: Callable[[int, int], None] = field(default=lambda offset, count: None)


class Wire:
    """A connection and what was read from it but not yet used."""

    def __init__(self, sock: socket.socket, patience: Patience, check: Callable[[], None]) -> None:
        self.check = check
        self._sock = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._patience = patience
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._watch_from, self._watched = time.monotonic(), 0
        self.block()
        self.fresh = True

    def close(self) -> None:
        self._sock.close()

    def unblocked(self) -> socket.socket:
        """The socket, for somebody who waits for many at once. Afterwards `block`."""
        self._sock.setblocking(False)
        return self._sock

    def block(self) -> None:
        """As it was made, but that it was used."""
        self.fresh = False
        seconds = min(SLICE_SECONDS, self._patience.read_seconds)
        _set_slice(self._sock, seconds, kernel=not self._tls)

    def is_quiet(self) -> bool:
        """Whether a kept connection is still usable: nothing to read, so not closed by the other side."""
        if self._start != self._end:
            return False
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return not poller.poll(0)

    # -- sending -----------------------------------------------------------------------------------
    def send(self, head: bytes, body: bytes | FileBody = b"") -> None:
        """Sends a request. When the other side stops listening its answer may say why, so that is no error yet."""
        self._watch_from, self._watched = time.monotonic(), 0
        try:
            if isinstance(body, FileBody):
                self._send_bytes(memoryview(head))
                self._send_file(body)
            else:
                self._send_bytes(memoryview(head + body))
        except Shrunk:
            raise
        except (BrokenPipeError, ConnectionResetError) as error:
            if not self._has_answer():
                raise (Temporary if self.fresh else Stale)(BROKE_OFF) from error
        except TimeoutError as error:
            raise Temporary(no_answer(self._patience.read_seconds)) from error
        except OSError as error:
            raise Temporary(BROKE_OFF) from error

    def _has_answer(self) -> bool:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return bool(poller.poll(0))

    def _send_bytes(self, data: memoryview) -> None:
        waited = 0.0
        while data:
            try:
                sent = self._sock.send(data)
            except (TimeoutError, BlockingIOError):
                waited = self._waited(waited)
                continue
            data, waited = data[sent:], 0.0

    def _send_file(self, body: FileBody) -> None:
        offset, end = body.offset, body.offset + body.length
        buffer = memoryview(bytearray(min(SEND_BYTES // 4, body.length))) if self._tls else None
        while offset < end:
            if buffer is not None:
                count = os.preadv(body.fd, [buffer[: end - offset]], offset)
                self._send_bytes(buffer[:count])
            else:
                count = self._sendfile(body.fd, offset, min(SEND_BYTES, end - offset))
            if not count:
                raise Shrunk(end - offset)
            body.sent(offset, count)
            self._moved(count)
            offset += count

    def _sendfile(self, fd: int, offset: int, count: int) -> int:
        waited = 0.0
        while True:
            try:
                return os.sendfile(self._sock.fileno(), fd, offset, count)
            except BlockingIOError:
                waited = self._waited(waited)

    # -- receiving ---------------------------------------------------------------------------------
    def head(self, seconds: float | None = None) -> tuple[int, str, dict[str, str]]:
        """Status, reason and headers (lower-case names) of the next answer; `1xx` answers are skipped.

        Raises Silent when nothing at all comes within `seconds`, which are `read_seconds` if not stated.
        """
        while True:
            status, reason, headers = parse_head(self._head_block(seconds))
            if status >= 200:
                return status, reason, headers

    def _head_block(self, seconds: float | None) -> str:
        longest = self._patience.read_seconds
        first = longest if seconds is None else min(seconds, longest)
        until = time.monotonic() + longest
        while True:
            at = self._buffer.find(b"\r\n\r\n", self._start, self._end)
            if at >= 0:
                text = str(self._view[self._start : at], "latin-1")
                self._start = at + 4
                self.fresh = False
                return text
            self._fill(first=first if self._start == self._end else None)
            if time.monotonic() > until:
                raise Temporary(no_answer(longest))

    def _fill(self, *, first: float | None) -> None:
        """Reads more into the buffer; keeps what is unused. `first`: seconds for the beginning of an answer."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._buffer):
            if self._start == 0:
                raise Temporary("the answer is not HTTP")
            kept = self._end - self._start
            self._buffer[:kept] = self._buffer[self._start : self._end]
            self._start, self._end = 0, kept
        count = self._recv(self._view[self._end :], first=first)
        if not count:
            raise (Stale if first is not None and not self.fresh else Temporary)(BROKE_OFF)
        self._end += count

    def read_into(self, view: memoryview) -> int:
        """Some bytes of a body; 0 at the end of the stream."""
        self.check()
        have = self._end - self._start
        if have:
            count = min(have, len(view))
            view[:count] = self._view[self._start : self._start + count]
            self._start += count
            return count
        count = self._recv(view, flags=0 if self._tls else socket.MSG_WAITALL)
        self._moved(count)
        return count

    def line(self) -> bytes:
        """One line of a chunked body's framing."""
        while True:
            at = self._buffer.find(b"\n", self._start, self._end)
            if at >= 0:
                line = bytes(self._view[self._start : at]).strip()
                self._start = at + 1
                return line
            self._fill(first=None)

    def _recv(self, view: memoryview, *, flags: int = 0, first: float | None = None) -> int:
        longest, waited = self._patience.read_seconds, 0.0
        stale = first is not None and not self.fresh
        while True:
            try:
                return self._sock.recv_into(view, 0, flags)
            except (TimeoutError, BlockingIOError) as error:
                try:
                    waited = self._waited(waited, first)
                except TimeoutError:
                    if first is not None:
                        raise Silent(first, longest) from error
                    raise Temporary(no_answer(longest)) from error
            except ConnectionError as error:
                raise (Stale if stale else Temporary)(BROKE_OFF) from error
            except OSError as error:
                raise Temporary(BROKE_OFF) from error

    # -- patience ----------------------------------------------------------------------------------
    def _waited(self, seconds: float, longest: float | None = None) -> float:
        """Adds one slice to what was waited in a row; raises TimeoutError when that is too much."""
        self.check()
        seconds += min(SLICE_SECONDS, self._patience.read_seconds)
        if seconds >= (self._patience.read_seconds if longest is None else longest):
            raise TimeoutError
        return seconds

    def _moved(self, count: int) -> None:
        """A connection that drips is as bad as a silent one: it is given up when a whole window was too slow."""
        self._watched += count
        now = time.monotonic()
        spent = now - self._watch_from
        if spent < self._patience.window_seconds:
            return
        if self._watched < self._patience.bytes_per_second * spent:
            raise Temporary(f"slower than {self._patience.bytes_per_second:.0f} bytes/s")
        self._watch_from, self._watched = now, 0

    def watch_anew(self) -> None:
        """The time until the answer began does not count as slowness of its body."""
        self._watch_from, self._watched = time.monotonic(), 0


def no_answer(seconds: float) -> str:
    return f"no answer within {seconds:g} s"


def parse_head(text: str) -> tuple[int, str, dict[str, str]]:
    """Status, reason and headers (lower-case names) of an answer. Raises Temporary when it is none."""
    lines = text.split("\r\n")
    version, _, rest = lines[0].partition(" ")
    code, _, reason = rest.partition(" ")
    if not version.startswith("HTTP/") or not STATUS.fullmatch(code):
        raise Temporary("the answer is not HTTP")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        key, value = name.lower(), value.strip()
        if key == "content-length" and headers.get(key, value) != value:
            raise Temporary("the answer is not HTTP")
        headers[key] = value
    if version == "HTTP/1.0":
        headers.setdefault("connection", "close")
    return int(code), reason.strip(), headers


def content_length(headers: Mapping[str, str]) -> int | None:
    """Of an answer's body, in bytes. Raises Temporary when it is no number that can be meant."""
    text = headers.get("content-length")
    if text is None:
        return None
    if not LENGTH.fullmatch(text):
        raise Temporary("the answer is not HTTP")
    return int(text)


def _set_slice(sock: socket.socket, seconds: float, *, kernel: bool) -> None:
    """Lets calls end after so long. By the kernel that costs nothing; Python's way, which TLS needs, is one more call each."""
    if not kernel:
        sock.settimeout(seconds)
        return
    sock.settimeout(None)
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


class Answer:
    """An answer whose body is still to be read."""

    def __init__(
        self, wire: Wire, status: int, reason: str, headers: Mapping[str, str], *, bodyless: bool
    ) -> None:
        self.wire, self.status, self.reason, self.headers = wire, status, reason, headers
        self.length: int | None = None
        self._left: int | None = None
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self._chunk = 0
        self._ended = False
        if bodyless or status in (204, 304):
            self._chunked, self._left, self._ended = False, 0, True
        if not self._chunked:
            self.length = content_length(headers)
        if not self._ended:
            self._left = self.length
            self._ended = self._left == 0
        wire.watch_anew()

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def reusable(self) -> bool:
        """Whether the connection can serve another request."""
        return self._ended and "close" not in self.headers.get("connection", "").lower()

    def read_into(self, view: memoryview) -> int:
        """Some bytes of the body, 0 at its end. Raises Temporary when it breaks off early."""
        if self._ended:
            return 0
        if self._chunked:
            return self._read_chunked(view)
        if self._left is None:  # no length: until the other side closes
            count = self.wire.read_into(view)
            if not count:
                self._ended = True
                self.headers = {**self.headers, "connection": "close"}
            return count
        count = self.wire.read_into(view[: self._left])
        if not count:
            raise Temporary(BROKE_OFF)
        self._left -= count
        self._ended = self._left == 0
        return count

    def read(self, limit: int = 1024 * 1024) -> bytes:
        """The whole body of a short answer; what is beyond the limit is left."""
        parts, left, view = [], limit, memoryview(bytearray(min(limit, 64 * 1024)))
        while left and (count := self.read_into(view[:left])):
            parts.append(bytes(view[:count]))
            left -= count
        return b"".join(parts)

    def _read_chunked(self, view: memoryview) -> int:
        if not self._chunk:
            found = CHUNK.match(self.wire.line())
            if found is None:
                raise Temporary("the answer is not HTTP")
            self._chunk = int(found[1], 16)
            if not self._chunk:
                while self.wire.line():
                    pass
                self._ended = True
                return 0
        count = self.wire.read_into(view[: self._chunk])
        if not count:
            raise Temporary(BROKE_OFF)
        self._chunk -= count
        if not self._chunk:
            self.wire.line()
        return count
