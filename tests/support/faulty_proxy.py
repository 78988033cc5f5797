"""A server in front of an object store that misbehaves as it is told: what networks and stores do to transfers.

Requests go through unchanged, their Host too, so that signatures stay good. Faults are for the signed requests of
workers only; what the control plane asks itself is left alone.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

CHUNK_BYTES = 64 * 1024
_EXPIRED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code>'
    b"<Message>Request has expired</Message></Error>"
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A signed request. `number` counts those of this method from 1."""

    method: str
    path: str
    part: int | None  # of an upload in parts
    signature: str
    number: int
    range: str | None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`status`: answered without asking the store. The others strike after that many bytes of the body, whichever way
    that goes: the connection is reset or goes silent until the end, or the byte there is changed. `only`: the answer is
    complete with that many bytes, as if there were no more."""

    status: int | None = None
    body: bytes = b""
    reset_after: int | None = None
    silent_after: int | None = None
    only: int | None = None
    change_at: int | None = None


EXPIRED = Fault(status=403, body=_EXPIRED)
BUSY = Fault(status=503)
Rule = Callable[[Asked], "Fault | None"]


@dataclass(kw_only=True)
class FaultyProxy:
    """`rule` may be changed at any time; `struck` counts the faults."""

    upstream: str
    rule: Rule = field(default=lambda asked: None)
    url: str = ""
    struck: int = 0
    silent: threading.Event = field(default_factory=threading.Event)  # somebody waits in vain
    _counts: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)

    def fault_for(self, method: str, path: str, range_: str | None) -> Fault | None:
        query = parse_qs(urlsplit(path).query)
        if "X-Amz-Signature" not in query:
            return None
        with self._lock:
            self._counts[method] = self._counts.get(method, 0) + 1
            part = query.get("partNumber")
            asked = Asked(
                method=method,
                path=path,
                part=int(part[0]) if part else None,
                signature=query["X-Amz-Signature"][0],
                number=self._counts[method],
                range=range_,
            )
            fault = self.rule(asked)
            self.struck += fault is not None
            return fault

    def be_silent(self) -> None:
        self.silent.set()
        self._over.wait(120)

    def end(self) -> None:
        self._over.set()


@contextlib.contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(upstream=upstream)

    class Handler(_Handler):
        faults = proxy

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=lambda: server.serve_forever(0.05), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.end()
        server.shutdown()
        thread.join()
        server.server_close()


class _Broken(Exception):
    """The fault has struck; the connection is of no use any more."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: FaultyProxy

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, _Broken):
            super().handle()

    def do_GET(self) -> None:
        fault = self.faults.fault_for(self.command, self.path, self.headers.get("Range"))
        if fault is not None and fault.status is not None:
            self._refuse(fault)
            return
        host = urlsplit(self.faults.upstream).netloc
        with contextlib.closing(http.client.HTTPConnection(host, timeout=60)) as connection:
            self._forward(connection, fault)

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _refuse(self, fault: Fault) -> None:
        left = int(self.headers.get("Content-Length", 0))
        while left > 0 and (piece := self.rfile.read(min(left, CHUNK_BYTES))):
            left -= len(piece)
        assert fault.status is not None
        self.send_response(fault.status)
        self.send_header("Content-Length", str(len(fault.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(fault.body)

    def _forward(self, connection: http.client.HTTPConnection, fault: Fault | None) -> None:
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                connection.putheader(name, value)
        connection.endheaders()
        sent = int(self.headers.get("Content-Length", 0))
        self._pass(self.rfile.read, connection.send, sent, fault if sent else None)
        answer = connection.getresponse()
        self._answer(answer, None if sent else fault)

    def _answer(self, answer: http.client.HTTPResponse, fault: Fault | None) -> None:
        length = answer.getheader("Content-Length")
        only = fault.only if fault is not None else None
        self.send_response_only(answer.status if only is None else 200, answer.reason)
        left_out = {"connection", "transfer-encoding", "content-length"}
        if only is not None:
            length, left_out = str(only), left_out | {"content-range", "accept-ranges"}
        for name, value in answer.getheaders():
            if name.lower() not in left_out:
                self.send_header(name, value)
        if length is None and self.command != "HEAD" and answer.status not in (204, 304):
            content = answer.read()
            length = str(len(content))
            read: Callable[[int], bytes] = _reader(content)
        else:
            read = answer.read
        if length is not None:
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD" and length is not None:
            self._pass(read, self.wfile.write, int(length), fault)

    def _pass(
        self,
        read: Callable[[int], bytes],
        write: Callable[[bytes], Any],
        length: int,
        fault: Fault | None,
    ) -> None:
        done = 0
        while done < length:
            piece = read(min(CHUNK_BYTES, length - done, self._until_fault(fault, done)))
            if not piece:
                raise _Broken
            if fault is not None and fault.change_at is not None:
                piece = _changed(piece, fault.change_at - done)
            write(piece)
            done += len(piece)
            self._strike(fault, done)

    @staticmethod
    def _until_fault(fault: Fault | None, done: int) -> int:
        marks = (fault.reset_after, fault.silent_after) if fault else ()
        return min(
            (mark - done for mark in marks if mark is not None and mark > done), default=CHUNK_BYTES
        )

    def _strike(self, fault: Fault | None, done: int) -> None:
        if fault is None:
            return
        if fault.reset_after is not None and done >= fault.reset_after:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            raise _Broken
        if fault.silent_after is not None and done >= fault.silent_after:
            self.faults.be_silent()
            raise _Broken


def _changed(piece: bytes, at: int) -> bytes:
    if not 0 <= at < len(piece):
        return piece
    return piece[:at] + bytes([piece[at] ^ 255]) + piece[at + 1 :]


def _reader(content: bytes) -> Callable[[int], bytes]:
    view = memoryview(content)

    def read(count: int) -> bytes:
        nonlocal view
        piece, view = view[:count], view[count:]
        return bytes(piece)

    return read
