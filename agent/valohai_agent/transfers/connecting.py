"""A connection to a server, or to the proxy before it: made in slices, so that nobody who gives up has to wait for it."""

from __future__ import annotations

import base64
import errno
import functools
import os
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

import certifi

from valohai_agent.errors import Unreachable
from valohai_agent.transfers.retries import Silent, Temporary
from valohai_agent.transfers.wire import BROKE_OFF, SLICE_SECONDS, Patience, Wire, no_answer


class Place(NamedTuple):
    """Whom to connect to. `proxy` is its URL, or empty."""

    scheme: str
    host: str
    port: int
    proxy: str


def basic_auth(lines: dict[str, str], header: str, parts: SplitResult) -> None:
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        lines[header.lower()] = f"{header}: Basic {base64.b64encode(pair.encode()).decode()}"


def connect(
    place: Place, patience: Patience, check: Callable[[], None], name: str
) -> socket.socket:
    """Connected and, for https, with the server's certificate verified. `check` may end the wait every quarter second.

    Raises Temporary, Unreachable, or what `check` raises.
    """
    if place.proxy:
        through = urlsplit(place.proxy)
        address = (through.hostname or "", through.port or 8080)
    else:
        address = (place.host, place.port)
    try:
        sock = _reach(address, patience.connect_seconds, check)
    except TimeoutError as error:
        seconds = f"{patience.connect_seconds:g} s"
        raise Temporary(f"no connection to {_whom(place)} within {seconds}") from error
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such name"
        raise Temporary(f"no connection to {_whom(place)}: {reason}") from error
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if place.scheme == "https":
            if place.proxy:
                _tunnel(sock, place, patience, check)
            return _greet(sock, place.host, patience.connect_seconds, check)
        return sock
    except ssl.SSLCertVerificationError as error:
        sock.close()
        raise Unreachable(f"{name}: the TLS certificate was not accepted") from error
    except TimeoutError as error:
        sock.close()
        raise Temporary(no_answer(patience.connect_seconds)) from error
    except OSError as error:
        sock.close()
        raise Temporary(BROKE_OFF) from error
    except BaseException:
        sock.close()
        raise


def _reach(address: tuple[str, int], seconds: float, check: Callable[[], None]) -> socket.socket:
    """The first address of the name that answers within its `seconds`. Raises OSError, of the last one."""
    failure: OSError = OSError("no such name")
    for family, kind, protocol, _, where in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:  # this machine knows no such family
            failure = error
            continue
        try:
            _reach_one(sock, where, time.monotonic() + seconds, check)
            return sock
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise failure


def _reach_one(sock: socket.socket, where: Any, until: float, check: Callable[[], None]) -> None:
    sock.setblocking(False)
    code = sock.connect_ex(where)
    if code == errno.EINPROGRESS:
        _wait(sock, select.POLLOUT, until, check)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))
    sock.setblocking(True)


def _greet(
    sock: socket.socket, host: str, seconds: float, check: Callable[[], None]
) -> ssl.SSLSocket:
    until = time.monotonic() + seconds
    sock.setblocking(False)
    secure = tls_context().wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    try:
        while True:
            try:
                secure.do_handshake()
                return secure
            except ssl.SSLWantReadError:
                _wait(secure, select.POLLIN, until, check)
            except ssl.SSLWantWriteError:
                _wait(secure, select.POLLOUT, until, check)
    except BaseException:
        secure.close()
        raise


def _wait(sock: socket.socket, event: int, until: float, check: Callable[[], None]) -> None:
    """Raises TimeoutError."""
    poller = select.poll()
    poller.register(sock, event)
    while not poller.poll(SLICE_SECONDS * 1000):
        check()
        if time.monotonic() > until:
            raise TimeoutError


def _whom(place: Place) -> str:
    return "the proxy" if place.proxy else f"{place.host}:{place.port}"


def _tunnel(
    sock: socket.socket, place: Place, patience: Patience, check: Callable[[], None]
) -> None:
    """Asks the proxy for a way to the server; the proxy sees only its name."""
    host = f"[{place.host}]" if ":" in place.host else place.host
    lines = {"host": f"Host: {host}:{place.port}"}
    basic_auth(lines, "Proxy-Authorization", urlsplit(place.proxy))
    wire = Wire(sock, patience, check)
    wire.send(
        "\r\n".join([f"CONNECT {host}:{place.port} HTTP/1.1", *lines.values(), "", ""]).encode(
            "latin-1"
        )
    )
    try:
        status, _, _ = wire.head()
    except Silent as error:  # of the proxy, which says nothing of the server
        raise Temporary(str(error)) from error
    if status != 200:
        raise Temporary(f"the proxy answered HTTP {status}")


@functools.cache
def tls_context() -> ssl.SSLContext:
    """Verifies certificates against the system's, certifi's and those that the environment names."""
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_default_certs()
    named = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if named:
        if os.path.isdir(named):
            context.load_verify_locations(capath=named)
        else:
            context.load_verify_locations(cafile=named)
    return context
