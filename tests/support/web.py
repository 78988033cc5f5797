"""A small HTTP server whose answers a test scripts, for downloads and uploads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Web:
    """`answers[path]` is a list of functions, one per request; the last one is kept."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Callable[[Any], None]]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.bodies: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}{path}"

    def count(self, method: str, path: str) -> int:
        return sum((m, p) == (method, path) for m, p, _ in self.requests)


@contextmanager
def serve() -> Iterator[Web]:
    web = Web()
    thread = threading.Thread(target=web.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield web
    finally:
        web.server.shutdown()
        web.server.server_close()
        thread.join()


def content(data: bytes, **headers: str) -> Callable[[Any], None]:
    """Answers with the data; a Range is honoured."""

    def answer(handler: Any) -> None:
        start = 0
        wanted = handler.headers.get("Range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        handler.send_response(206 if wanted else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data[start:])

    return answer


def broken(data: bytes, after: int, **headers: str) -> Callable[[Any], None]:
    """Promises the data and closes the connection after some bytes."""

    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data[:after])
        handler.wfile.flush()
        handler.close_connection = True

    return answer


def status(code: int, **headers: str) -> Callable[[Any], None]:
    def answer(handler: Any) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def silence(seconds: float) -> Callable[[Any], None]:
    """Accepts the request and says nothing."""

    def answer(handler: Any) -> None:
        threading.Event().wait(seconds)
        handler.close_connection = True

    return answer


def _handler(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            path = self.path.split("?")[0]
            web.requests.append((self.command, path, dict(self.headers)))
            length = int(self.headers.get("Content-Length", 0))
            if length:
                web.bodies[path] = self.rfile.read(length)
            answers = web.answers.get(path, [status(404)])
            (answers.pop(0) if len(answers) > 1 else answers[0])(self)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    return Handler
