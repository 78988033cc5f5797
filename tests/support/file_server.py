"""A plain web server of a directory that knows ranges, ETags and basic authentication, as file servers do."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.support.tls import Certificate, speak_tls


@dataclass(kw_only=True)
class FileServer:
    """`refuses_head`, `says_etag` and `redirects` (path to address) change how it answers. A PUT makes a file."""

    directory: Path
    url: str = ""
    login: tuple[str, str] | None = None
    refuses_head: bool = False
    says_etag: bool = True
    redirects: dict[str, str] = field(default_factory=dict)
    seen: list[dict[str, str]] = field(default_factory=list)  # headers of every request

    def put(self, key: str, content: bytes) -> None:
        path = self.directory / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@contextmanager
def serving(
    directory: Path,
    *,
    login: tuple[str, str] | None = None,
    certificate: Certificate | None = None,
) -> Iterator[FileServer]:
    """With a certificate it speaks HTTPS."""
    directory.mkdir(parents=True, exist_ok=True)
    files = FileServer(directory=directory, login=login)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, files))
    scheme = "http"
    if certificate is not None:
        speak_tls(server, certificate)
        scheme = "https"
    files.url = f"{scheme}://127.0.0.1:{server.server_port}/files"
    thread = threading.Thread(target=partial(server.serve_forever, 0.05))
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, files: FileServer, *arguments: object) -> None:
        self._files = files
        super().__init__(*arguments)  # pyright: ignore[reportArgumentType]

    def do_HEAD(self) -> None:
        if self._files.refuses_head:
            self._answer(405)
        else:
            self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def do_PUT(self) -> None:
        """Never overwrites."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self._files.seen.append(dict(self.headers.items()))
        key = unquote(urlsplit(self.path).path).removeprefix("/files/")
        if (self._files.directory / key).exists():
            self._answer(412)
            return
        self._files.put(key, content)
        self._answer(201)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _serve(self, *, body: bool) -> None:
        files = self._files
        files.seen.append(dict(self.headers.items()))
        path = unquote(urlsplit(self.path).path).removeprefix("/files/")
        if files.login is not None:
            wanted = base64.b64encode(":".join(files.login).encode()).decode()
            if self.headers.get("Authorization") != f"Basic {wanted}":
                self._answer(401)
                return
        if path in files.redirects:
            self._answer(302, {"Location": files.redirects[path]})
            return
        target = files.directory / path
        if not target.is_file():
            self._answer(404)
            return
        self._content(target, body=body)

    def _content(self, target: Path, *, body: bool) -> None:
        content, found = target.read_bytes(), target.stat()
        headers = {"Last-Modified": formatdate(found.st_mtime, usegmt=True)}
        if self._files.says_etag:
            headers["ETag"] = f'"{found.st_size}-{found.st_mtime_ns}"'
        status, first, last = 200, 0, len(content)
        if asked := self.headers.get("Range", "").removeprefix("bytes="):
            begin, _, end = asked.partition("-")
            first, last = int(begin), min(int(end or len(content)) + 1, len(content))
            if first >= len(content):
                self._answer(416, {"Content-Range": f"bytes */{len(content)}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {first}-{last - 1}/{len(content)}"
        self._answer(status, headers, content[first:last], body=body)

    def _answer(
        self,
        status: int,
        headers: dict[str, str] | None = None,
        content: bytes = b"",
        *,
        body: bool = True,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)
