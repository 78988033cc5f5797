"""Many small requests by many connections in one thread.

A thread for each request spends more time on taking turns in the interpreter than on moving a small file. Here one
thread waits for all connections together. It knows only requests that go well: whatever else happens (no connection,
another status, a silent server) its errand comes back undone, for the ordinary way that retries and explains.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from valohai_agent.errors import AgentError
from valohai_agent.protocol import Transfer
from valohai_agent.transfers.pace import Shared, Transferred
from valohai_agent.transfers.pool import Place
from valohai_agent.transfers.retries import Temporary
from valohai_agent.transfers.wire import SLICE_SECONDS, Wire, content_length, parse_head

SMALL_BYTES = 1024 * 1024  # of a file that goes this way: it is held in memory
CONNECTIONS = 32  # of one lane
CONNECTING = 4  # of these at a time
HEAD_BYTES = 64 * 1024
SEND_BYTES = 64 * 1024  # at once: TLS tells of no less that it has sent
PATIENCE_SECONDS = 20.0  # with a silent server
LONGEST_SECONDS = 180.0  # of one errand, however slowly it moves
REST_SECONDS = 60.0  # without lanes after one was given up
FAILURES = 8  # in a row: then the server has trouble, and nothing else is tried here
NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Errand(Protocol):
    """One request and what its answer means."""

    name: str
    method: str
    transfer: Transfer

    def body(self) -> bytes | None:
        """What to send; may be asked for again. Raises AgentError or OSError when there is no such thing any more."""
        ...

    def answered(
        self, status: int, headers: Mapping[str, str], content: memoryview
    ) -> Transferred | None:
        """The result of a 2xx answer, None when the ordinary way shall see to it. Raises AgentError, OSError."""
        ...

    def close(self) -> None:
        """It is over, whatever came of it."""
        ...


E = TypeVar("E", bound=Errand)


class _Line:
    """A connection and the errand that it is on."""

    def __init__(self, place: Place, wire: Wire) -> None:
        self.place, self.wire, self.sock = place, wire, wire.unblocked()
        self.buffer = bytearray(HEAD_BYTES + SMALL_BYTES)
        self.view = memoryview(self.buffer)
        self.out = memoryview(b"")
        self.have = self.content = self.need = 0
        self.since = self.moved_at = 0.0

    def begin(self, request: bytes) -> None:
        self.out = memoryview(request)
        self.since = self.moved_at = time.monotonic()
        self.have = self.content = self.need = 0
        self.headers: dict[str, str] = {}
        self.status = 0

    def send(self) -> bool:
        """Sends what can be sent; whether that is all."""
        try:
            while self.out:
                self.out = self.out[self.sock.send(self.out[:SEND_BYTES]) :]
                self.moved_at = time.monotonic()
        except NOT_NOW:
            return False
        return True

    def receive(self) -> bool:
        """Reads what is there; whether the answer is whole. Raises Temporary, OSError."""
        while not self.need or self.have < self.need:
            try:
                count = self.sock.recv_into(self.view[self.have :])
            except NOT_NOW:
                return False
            if not count:
                raise Temporary("the connection broke off")
            self.have += count
            self.moved_at = time.monotonic()
            if not self.need:
                self._look_for_head()
        return True

    def _look_for_head(self) -> None:
        at = self.buffer.find(b"\r\n\r\n", 0, min(self.have, HEAD_BYTES))
        if at < 0:
            if self.have >= HEAD_BYTES:
                raise Temporary("the answer is not HTTP")
            return
        self.status, _, self.headers = parse_head(str(self.view[:at], "latin-1"))
        length = 0 if self.status == 204 else content_length(self.headers)
        if "transfer-encoding" in self.headers:
            length = None
        self.content = at + 4
        self.need = self.content + (length or 0)
        if length is None or self.need > len(self.buffer):
            self.headers["connection"] = "close"
            self.need = self.content

    @property
    def reusable(self) -> bool:
        more = self.have != self.need
        return not more and "close" not in self.headers.get("connection", "").lower()


class Lane(Generic[E]):
    """Runs errands, in about their order, by as many connections as keep it busy."""

    def __init__(self, shared: Shared) -> None:
        self._shared, self._pool = shared, shared.pool
        self._selector = selectors.DefaultSelector()
        self._made: SimpleQueue[tuple[E, Place, bytes, Future[Wire]]] = SimpleQueue()
        self._bell, self._ring = socket.socketpair()
        self._bell.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._busy: dict[_Line, E] = {}
        self._waiting: deque[E] = deque()
        self._connecting = 0
        self._failed = 0

    def run(self, errands: Iterable[E]) -> Iterator[tuple[E, Transferred | None]]:
        """Each errand with its result, None when it is undone; in the order in which they end.

        When the transferer was cancelled, all that is left comes back undone.
        """
        waiting = self._waiting
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            if time.monotonic() < self._shared.lanes_rest_until:
                yield from ((errand, None) for errand in errands)
                return
            waiting.extend(errands)
            crew = stack.enter_context(ThreadPoolExecutor(CONNECTING, "connect"))
            while waiting or self._busy or self._connecting:
                yield from self._given_up(waiting)
                ready = self._selector.select(0)
                if not ready and self._may_begin(waiting):
                    yield from self._begin(waiting.popleft(), crew)
                    continue
                if not ready:
                    ready = self._selector.select(SLICE_SECONDS)
                    yield from self._overdue()
                for key, _ in ready:
                    if key.data is None:
                        yield from self._connected()
                    elif key.data in self._busy:
                        yield from self._go_on(key.data, waiting)

    def _given_up(self, waiting: deque[E]) -> Iterator[tuple[E, None]]:
        """What is not tried any more."""
        if self._shared.cancelled:
            self._failed = FAILURES
            for line in list(self._busy):
                yield self._drop(line), None
        if waiting and self._failed >= FAILURES:
            self._shared.lanes_rest_until = time.monotonic() + REST_SECONDS
            while waiting:
                yield self._undone(waiting.popleft()), None

    def _close(self) -> None:
        for line, errand in self._busy.items():
            line.wire.close()
            errand.close()
        for errand in self._waiting:
            errand.close()
        with contextlib.suppress(Empty):
            while True:
                errand, _, _, made = self._made.get_nowait()
                errand.close()
                if made.exception() is None:
                    made.result().close()
        self._selector.close()
        self._bell.close()
        self._ring.close()

    # -- beginning -------------------------------------------------------------------------------------------------
    def _may_begin(self, waiting: deque[E]) -> bool:
        """All that is under way waits for others: one more connection is worth it."""
        lines = len(self._busy) + self._connecting
        return bool(waiting) and lines < CONNECTIONS and self._connecting < CONNECTING

    def _begin(self, errand: E, crew: ThreadPoolExecutor) -> Iterator[tuple[E, None]]:
        """Gives the errand back if it cannot be begun."""
        prepared = self._prepare(errand)
        if prepared is None:
            yield self._undone(errand), None
            return
        place, request = prepared
        wire = self._pool.idle(place, self._shared.check)
        if wire is not None:
            self._start(_Line(place, wire), errand, request, fresh=True)
            return
        self._connecting += 1
        made = crew.submit(self._pool.connect, place, self._shared.check, errand.name)
        made.add_done_callback(lambda made: self._announce(errand, place, request, made))

    def _prepare(self, errand: Errand) -> tuple[Place, bytes] | None:
        try:
            body = errand.body()
            length = None if body is None else len(body)
            place, head = self._pool.prepare(
                errand.method, errand.transfer, length=length, name=errand.name
            )
        except (AgentError, OSError):
            return None
        return place, head + body if body else head

    def _announce(self, errand: E, place: Place, request: bytes, made: Future[Wire]) -> None:
        self._made.put((errand, place, request, made))
        with contextlib.suppress(OSError):  # the lane is over
            self._ring.send(b"!")

    def _connected(self) -> Iterator[tuple[E, None]]:
        with contextlib.suppress(OSError):
            self._bell.recv(64)
        while True:
            try:
                errand, place, request, made = self._made.get_nowait()
            except Empty:
                return
            self._connecting -= 1
            if made.exception() is not None:
                yield self._undone(errand), None
                continue
            self._start(_Line(place, made.result()), errand, request, fresh=True)

    def _start(self, line: _Line, errand: E, request: bytes, *, fresh: bool) -> None:
        line.begin(request)
        self._busy[line] = errand
        events = selectors.EVENT_READ
        with contextlib.suppress(OSError):  # reading will tell
            if not line.send():
                events |= selectors.EVENT_WRITE
        if fresh:
            self._selector.register(line.sock, events, line)
        elif events != selectors.EVENT_READ:
            self._selector.modify(line.sock, events, line)

    # -- going on --------------------------------------------------------------------------------------------------
    def _go_on(self, line: _Line, waiting: deque[E]) -> Iterator[tuple[E, Transferred | None]]:
        try:
            if line.out and line.send():
                self._selector.modify(line.sock, selectors.EVENT_READ, line)
            if not line.receive():
                return
        except (Temporary, OSError):
            yield self._drop(line), None
            return
        self._pool.heard(line.place)
        if line.out or not 200 <= line.status < 300:
            yield self._drop(line), None
            return
        errand = self._busy.pop(line)
        result = self._result(line, errand)
        self._failed = 0 if result is not None else self._failed + 1
        if not (line.reusable and self._next(line, waiting)):
            self._selector.unregister(line.sock)
            usable = line.reusable
            if usable:
                line.wire.block()
            self._pool.give_back(line.place, line.wire, usable=usable)
        yield errand, result

    def _result(self, line: _Line, errand: Errand) -> Transferred | None:
        try:
            content = line.view[line.content : line.need]
            return errand.answered(line.status, line.headers, content)
        except (AgentError, OSError):
            return None
        finally:
            errand.close()

    def _next(self, line: _Line, waiting: deque[E]) -> bool:
        """Sends the line on its next errand, if that goes to the same server."""
        if not waiting or self._failed >= FAILURES:
            return False
        prepared = self._prepare(waiting[0])
        if prepared is None or prepared[0] != line.place:
            return False
        self._start(line, waiting.popleft(), prepared[1], fresh=False)
        return True

    def _overdue(self) -> Iterator[tuple[E, None]]:
        now = time.monotonic()
        silent, slow = now - PATIENCE_SECONDS, now - LONGEST_SECONDS
        for line in [one for one in self._busy if one.moved_at < silent or one.since < slow]:
            yield self._drop(line), None

    def _drop(self, line: _Line) -> E:
        self._selector.unregister(line.sock)
        line.wire.close()
        return self._undone(self._busy.pop(line))

    def _undone(self, errand: E) -> E:
        self._failed += 1
        errand.close()
        return errand
