"""An object store on a socket that misbehaves as it is told: resets, storms, dripping, signatures that run out.

GET knows ranges and If-Range; PUT and POST know the parts of S3, Azure and Swift and resumable sessions.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from valohai_agent.protocol import Parts, Transfer, UploadGrant

RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Unruly:
    """What it holds and what goes wrong. Counters go down as faults happen."""

    data: bytes = b""
    etag: str | None = '"v1"'
    ranges: bool = True
    chunked: bool = False
    claimed: int | None = None  # length that is claimed instead of the true one
    reset_every: int = 0  # bytes of each answer after which the connection is reset
    resets: int = 1 << 30  # how often that happens
    storm: int = 0  # requests that are answered 503
    storm_status: int = 503
    drip: bool = False  # one byte now and then
    dripped: threading.Event = field(default_factory=threading.Event)
    signature: str = ""  # what the query must say; "" is anything
    expires_after: int = 1 << 30  # requests after which the signature is `fresh`
    change_after: int = 1 << 30  # requests after which the content is another one
    finish_error: int = 0  # finishes that end in an <Error> behind a 200
    lose_finish: int = 0  # finishes that are done but not answered
    lose_chunks: int = 0  # bytes of a session's chunk that arrive before a reset
    session_reset: int = 0
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    parts: dict[int, bytes] = field(default_factory=dict)
    session: bytearray = field(default_factory=bytearray)
    stored: bytes | None = None
    list_sent: bytes = b""
    connections: int = 0
    lock: Any = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    def url(self, path: str = "/f", query: str = "") -> str:
        return f"http://127.0.0.1:{self.port}{path}{'?' + query if query else ''}"

    def get(self, signature: str = "") -> Transfer:
        return Transfer(url=self.url(query=f"sig={signature}" if signature else ""))

    def grant(
        self, style: Any, part_bytes: int, numbers: Any = range(0), *, signature: str = ""
    ) -> UploadGrant:
        whole = Transfer(url=self.url("/whole"), method="PUT")
        return UploadGrant(
            upload_id="u",
            transfer=whole,
            parts=self.some_parts(style, part_bytes, numbers, signature=signature),
        )

    def some_parts(
        self, style: Any, part_bytes: int, numbers: Any, *, signature: str = ""
    ) -> Parts:
        sig = f"&sig={signature}" if signature else ""
        parts = {
            number: Transfer(url=self.url("/part", f"n={number}{sig}"), method="PUT")
            for number in numbers
        }
        method = "POST" if style == "s3" else "PUT"
        finish = Transfer(url=self.url("/finish", f"x=1{sig}"), method=method)
        if style == "session":
            parts = {1: Transfer(url=self.url("/session"), method="PUT")}
        return Parts(
            style=style,
            part_bytes=part_bytes,
            parts=parts,
            finish=finish if style in ("s3", "azure") else None,
        )

    def count(self, method: str, path: str = "/f") -> int:
        return sum((m, p.split("?")[0]) == (method, path) for m, p, _ in self.requests)


@contextmanager
def unruly(**faults: Any) -> Iterator[Unruly]:
    state = Unruly(**faults)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    server.daemon_threads = True
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Reset(Exception):
    pass


def _handler(state: Unruly) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        world = state

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    world: Unruly

    def setup(self) -> None:
        super().setup()
        with self.world.lock:
            self.world.connections += 1

    def handle(self) -> None:
        try:
            super().handle()
        except (_Reset, ConnectionError):
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    # -- what every request goes through ---------------------------------------------------------------
    def _refused(self) -> bool:
        state = self.world
        with state.lock:
            state.requests.append((self.command, self.path, dict(self.headers)))
            if len(state.requests) > state.expires_after:
                state.signature = "fresh"
            if len(state.requests) > state.change_after and state.etag == '"v1"':
                state.data, state.etag = bytes(reversed(state.data)), '"v2"'
            storm, state.storm = state.storm > 0, state.storm - 1
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        if state.signature and query.get("sig") != [state.signature]:
            self._answer(403, b"<Error><Code>AccessDenied</Code><Message>secret</Message></Error>")
            return True
        if storm:
            self._answer(state.storm_status, b"<Error><Code>SlowDown</Code></Error>")
            return True
        return False

    def _answer(self, status: int, body: bytes = b"", **headers: Any) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    # -- downloads ---------------------------------------------------------------------------------------
    def do_GET(self) -> None:
        state = self.world
        if self._refused():
            return
        data, etag = state.data, state.etag
        wanted = RANGE.fullmatch(self.headers.get("Range", "")) if state.ranges else None
        if self.headers.get("If-Range", etag) != etag:
            wanted = None
        first = int(wanted.group(1)) if wanted else 0
        last = int(wanted.group(2) or len(data) - 1) if wanted else len(data) - 1
        body = data[first : last + 1]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        if etag:
            self.send_header("ETag", etag)
        if state.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if state.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(body), 70_000):
                piece = body[start : start + 70_000]
                self.wfile.write(b"%x;x=y\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\nTrailer: 1\r\n\r\n")
            return
        claimed = len(body) if state.claimed is None else state.claimed
        self.send_header("Content-Length", str(claimed))
        self.end_headers()
        self._send(body)
        if claimed != len(body):
            self.close_connection = True

    def _send(self, body: bytes) -> None:
        state = self.world
        if state.drip:
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                state.dripped.set()
                if state.stopped.wait(0.02):
                    return
        with state.lock:
            reset = 0 < state.reset_every < len(body) and state.resets > 0
            state.resets -= reset
        if reset:
            self.wfile.write(body[: state.reset_every])
            self.wfile.flush()
            # What is sent but not read when the reset comes is thrown away: give it a moment to be read.
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            state.stopped.wait(0.01)
            raise _Reset
        self.wfile.write(body)

    # -- uploads -----------------------------------------------------------------------------------------
    def do_PUT(self) -> None:
        state, path = self.world, urllib.parse.urlsplit(self.path)
        length = int(self.headers.get("Content-Length", 0))
        if path.path == "/session":
            return self._session(length)
        if state.reset_every and state.reset_every < length and state.resets > 0:
            state.resets -= 1
            state.requests.append((self.command, self.path, dict(self.headers)))
            self.rfile.read(state.reset_every)
            raise _Reset
        body = self.rfile.read(length)
        if self._refused():
            return None
        if path.path == "/finish":
            return self._finish(body)
        if path.path == "/part":
            number = int(urllib.parse.parse_qs(path.query)["n"][0])
            state.parts[number] = body
            return self._answer(200, ETag=f'"part{number}"')
        state.stored = body
        return self._answer(200, ETag='"whole"')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._refused():
            self._finish(body)

    def _finish(self, body: bytes) -> None:
        state = self.world
        if state.stored is not None:
            return self._answer(404, b"<Error><Code>NoSuchUpload</Code></Error>")
        if state.finish_error > 0:
            state.finish_error -= 1
            return self._answer(200, b"<Error><Code>InternalError</Code></Error>")
        state.list_sent = body
        state.stored = b"".join(state.parts[number] for number in sorted(state.parts))
        if state.lose_finish > 0:
            state.lose_finish -= 1
            raise _Reset
        return self._answer(200, b"<Done/>")

    def _session(self, length: int) -> None:
        state = self.world
        state.requests.append((self.command, self.path, dict(self.headers)))
        span = self.headers["Content-Range"]
        total = int(span.rpartition("/")[2])
        if length:
            if state.session_reset > 0:
                state.session_reset -= 1
                state.session += self.rfile.read(state.lose_chunks)
                raise _Reset
            assert int(span.split()[1].split("-")[0]) == len(state.session)
            state.session += self.rfile.read(length)
        if len(state.session) == total:
            state.stored = bytes(state.session)
            return self._answer(200, ETag='"session"')
        headers = {"Range": f"bytes=0-{len(state.session) - 1}"} if state.session else {}
        return self._answer(308, b"", **headers)
