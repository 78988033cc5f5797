"""An HTTP proxy as companies have them: the whole URL in requests for http, a tunnel for https."""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from tests.support.servers.endpoint import Endpoint


class HttpProxy(Endpoint):
    """`asked` has the method and target of each request; `login` as `Basic ...`, if it wants one."""

    def __init__(self, login: str | None = None) -> None:
        super().__init__(_Handler)
        self.login = login
        self.asked: list[tuple[str, str]] = []


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if not self._may():
            return
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        headers = {k: v for k, v in self.headers.items() if not k.lower().startswith("proxy-")}
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        with contextlib.closing(http.client.HTTPConnection(parts.netloc, timeout=30)) as upstream:
            upstream.request(self.command, target, body=body, headers=headers)
            answer = upstream.getresponse()
            content = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    do_PUT = do_HEAD = do_GET

    def do_CONNECT(self) -> None:
        if not self._may():
            return
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=30) as upstream:
            self.send_response_only(200)
            self.end_headers()
            _pass_on(self.connection, upstream)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _may(self) -> bool:
        proxy: HttpProxy = self.server.endpoint  # pyright: ignore[reportAttributeAccessIssue]
        proxy.asked.append((self.command, self.path))
        if proxy.login in (None, self.headers.get("Proxy-Authorization")):
            return True
        self.send_response_only(407)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    """Until one of the two closes."""
    to = {one: other, other: one}
    with contextlib.suppress(ConnectionError):
        while True:
            for source in select.select([one, other], [], [], 30)[0]:
                piece = source.recv(65536)
                if not piece:
                    return
                to[source].sendall(piece)
