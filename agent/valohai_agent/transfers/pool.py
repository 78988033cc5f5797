"""Connections that are kept for the next request: by server, with proxies, TLS, basic auth and redirects."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from valohai_agent.errors import Refused, Unreachable
from valohai_agent.protocol import Transfer
from valohai_agent.transfers.connecting import Place, basic_auth, connect
from valohai_agent.transfers.retries import Silent, Temporary
from valohai_agent.transfers.wire import (
    Answer,
    FileBody,
    Patience,
    Stale,
    Wire,
)

KEPT_CONNECTIONS = 32  # per server; more than that are closed after use
REDIRECTS = 5
URL = re.compile(r"(https?)://([^/?#]*)([^#]*)", re.IGNORECASE)
GIVEN_UP_SECONDS = 60.0  # in which a server that never answered is not asked again
READING = frozenset({"GET", "HEAD"})
REDIRECT_STATUS = frozenset({301, 302, 303, 307, 308})


class Server(NamedTuple):
    """What all requests to one server have in common: `lines` are header lines by lower-case name."""

    place: Place
    origin: str  # before the path where a proxy is asked for whole URLs
    lines: dict[str, str]


class Pool:
    """Makes requests; safe for several threads."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._idle: dict[Place, list[Wire]] = {}
        self._servers: dict[tuple[str, str], Server] = {}
        self._heard: set[Place] = set()
        self._silent: set[Place] = set()
        self._given_up: dict[Place, float] = {}  # until when, by time.monotonic()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for wires in idle.values():
            for wire in wires:
                wire.close()

    @contextlib.contextmanager
    def request(
        self,
        method: str,
        transfer: Transfer,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | FileBody | None = None,
        check: Callable[[], None] = lambda: None,
        follow: bool = False,
        name: str = "",
    ) -> Iterator[Answer]:
        """The answer, its body unread; with `follow` that of the last redirect. The connection is kept if it can be.

        Headers of the transfer may be secrets, whatever they are called: no other server gets them. `headers` are ours.
        """
        url, granted, ours = transfer.url, transfer.headers, headers or {}
        for _ in range(REDIRECTS):
            server, target = self._server(url, name)
            place = server.place
            answer = self._ask(server, target, method, {**granted, **ours}, body, check, name)
            finished = False
            try:
                location = answer.headers.get("location")
                if not (follow and location and answer.status in REDIRECT_STATUS):
                    yield answer
                    finished = answer.reusable
                    return
                answer.read(64 * 1024)
                finished = answer.reusable
            finally:
                self.give_back(place, answer.wire, usable=finished)
            url = urljoin(url, location)
            if self._server(url, name)[0].place[:3] != place[:3]:
                granted = {}
        raise Refused(f"{name}: more than {REDIRECTS} redirects, now to {urlsplit(url).hostname}")

    # -- for whoever talks by several connections at once ---------------------------------------------------------
    def prepare(
        self, method: str, transfer: Transfer, *, length: int | None, name: str
    ) -> tuple[Place, bytes]:
        """Whom to ask, and the head of the request; `length` is that of its body. Raises Refused."""
        server, target = self._server(transfer.url, name)
        return server.place, _head(server, method, target, transfer.headers, length)

    def idle(self, place: Place, check: Callable[[], None]) -> Wire | None:
        """A kept connection, if there is one."""
        while True:
            with self._lock:
                wires = self._idle.get(place)
                wire = wires.pop() if wires else None
            if wire is None:
                return None
            if wire.is_quiet():
                wire.check = check
                return wire
            wire.close()

    def connect(self, place: Place, check: Callable[[], None], name: str) -> Wire:
        """A new connection. Raises Temporary, Unreachable."""
        return Wire(connect(place, self._patience, check, name), self._patience, check)

    def give_back(self, place: Place, wire: Wire, *, usable: bool) -> None:
        """Keeps the connection for the next request if it can serve one."""
        if usable:
            with self._lock:
                wires = self._idle.setdefault(place, [])
                if len(wires) < KEPT_CONNECTIONS:
                    wires.append(wire)
                    return
        wire.close()

    # -- one request ----------------------------------------------------------------------------------------------
    def _server(self, url: str, name: str) -> tuple[Server, str]:
        """The server, and what to ask it for. What its name comes to, and its proxy, is looked at once."""
        found = URL.match(url)
        scheme, netloc, target = found.groups() if found else ("", "", "")
        server = self._servers.get((scheme, netloc))
        if server is None:
            server = self._servers[scheme, netloc] = _server(url, name)
        return server, target if target.startswith("/") else f"/{target}"

    def _ask(
        self,
        server: Server,
        target: str,
        method: str,
        headers: Mapping[str, str],
        body: bytes | FileBody | None,
        check: Callable[[], None],
        name: str,
    ) -> Answer:
        length = body.length if isinstance(body, FileBody) else None if body is None else len(body)
        head, place = _head(server, method, target, headers, length), server.place
        seconds = self._first_seconds(place, method, name)
        while True:
            wire = self.idle(place, check) or self.connect(place, check, name)
            try:
                wire.send(head, body or b"")
                status, reason, answered = wire.head(seconds)
                self.heard(place)
                return Answer(wire, status, reason, answered, bodyless=method == "HEAD")
            except Stale:
                wire.close()
                if method not in READING:  # whoever writes wants to know that it may have arrived
                    raise
            except Silent as error:
                wire.close()
                if place in self._heard or method not in READING:
                    raise Temporary(str(error)) from error
                error.place = place
                if method == "GET":
                    self._silent.add(place)
                raise
            except BaseException:
                wire.close()
                raise

    # -- servers that never answer --------------------------------------------------------------------------------
    def heard(self, place: Place) -> None:
        """It has answered something."""
        self._heard.add(place)

    def give_up(self, error: Silent) -> None:
        """For a while nobody else shall wait for that server, unless it answers somebody after all."""
        if error.place is not None:
            self._given_up[error.place] = time.monotonic() + GIVEN_UP_SECONDS

    def _first_seconds(self, place: Place, method: str, name: str) -> float | None:
        """How long the first byte of an answer may take; None for as long as any other. Raises Unreachable."""
        if place in self._heard or method not in READING:
            return None
        if time.monotonic() < self._given_up.get(place, 0.0):
            raise Unreachable(
                f"{name}: {place.host}:{place.port} has not answered the requests for other files either. "
                "Check that the address can be reached from the worker, then launch again."
            )
        return None if place in self._silent else self._patience.answer_seconds


def _server(url: str, name: str) -> Server:
    """Only http and https: a server must not redirect to a file of this machine."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Refused(f"{name}: the URL is not valid") from error
    scheme, host = parts.scheme, parts.hostname or ""
    if scheme not in ("http", "https") or not host:
        raise Refused(f"{name}: the URL is not valid: {scheme!r} is not http or https")
    place = Place(scheme, host, port or (443 if scheme == "https" else 80), _proxy(scheme, host))
    authority = parts.netloc.rpartition("@")[2]
    lines = {"host": f"Host: {authority}", "accept-encoding": "Accept-Encoding: identity"}
    basic_auth(lines, "Authorization", parts)
    if not (place.proxy and scheme == "http"):
        return Server(place, "", lines)
    basic_auth(lines, "Proxy-Authorization", urlsplit(place.proxy))
    return Server(place, f"http://{authority}", lines)


def _proxy(scheme: str, host: str) -> str:
    proxies = getproxies_environment()
    proxy = proxies.get(scheme) or proxies.get("all") or ""
    if not proxy or proxy_bypass(host):
        return ""
    return proxy if "://" in proxy else f"http://{proxy}"


def _head(
    server: Server, method: str, target: str, headers: Mapping[str, str], length: int | None
) -> bytes:
    lines = server.lines.copy()
    for key, value in headers.items():
        lines[key.lower()] = f"{key}: {value}"
    if length is not None:
        lines["content-length"] = f"Content-Length: {length}"
    text = "\r\n".join(
        [f"{method} {server.origin}{_ascii(target)} HTTP/1.1", *lines.values(), "", ""]
    )
    return text.encode("latin-1", "replace")


def _ascii(target: str) -> str:
    """Characters that must not stand in a request line are escaped; a `%` is left as it is."""
    if target.isascii() and " " not in target and target.isprintable():
        return target
    return "".join(
        c if c.isascii() and c.isprintable() and c != " " else _escaped(c) for c in target
    )


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
