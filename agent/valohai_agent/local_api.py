"""The small HTTP server behind api.json (K-38, K-39), for this execution's own command only."""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import selectors
import shutil
import socket
import socketserver
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from valohai_agent.errors import AgentError
from valohai_agent.local_files import file_path
from valohai_agent.protocol import Grants, JobFile, JobInput, Transfer, utcnow
from valohai_agent.transfers.pool import Pool
from valohai_agent.transfers.retries import Temporary
from valohai_agent.transfers.wire import Answer, Patience

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024
MAX_DETAIL_CHARACTERS = 1000
PIECE_BYTES = 256 * 1024  # of a file that is passed on
MARGIN = timedelta(seconds=30)  # a permission that runs out within it is renewed first
NO_CATALOG = "This platform has no trigger catalogue yet: call the webhook's URL directly."


class LocalApi:
    """Serves set_status_detail, input_request and trigger_catalog under a token only api.json names.

    `bind_host` and `public_host` are `Runtime.api_hosts(...)`: where to listen, and what the command
    connects to. `input_grants(file_ids)` asks the control plane (kind `input`); files granted as
    `file://` are served from here, since the command cannot see them. A context manager.
    """

    def __init__(
        self,
        *,
        bind_host: str,
        public_host: str,
        inputs: Sequence[JobInput],
        on_status_detail: Callable[[str], None],
        input_grants: Callable[[list[str]], Grants],
    ) -> None:
        self._token = secrets.token_urlsafe(32)
        self._inputs = {item.input_id: item for item in inputs}
        self._on_status_detail = on_status_detail
        self._input_grants = input_grants
        self.pool = Pool(Patience(bytes_per_second=0.0))  # the pace is the command's
        self._served: dict[str, tuple[str, Transfer]] = {}  # by token: the file's id, its grant
        self._server = _Server((bind_host, 0), _Handler)
        self._server.api = self
        self._base = f"http://{public_host}:{self._server.server_address[1]}"
        self._end, seen = socket.socketpair()
        self._thread = threading.Thread(target=self._server.serve_until, args=(seen,), daemon=True)
        self._thread.start()

    def endpoints(self) -> dict[str, Any]:
        """Content of api.json: each entry is enough for `requests.request(**entry)` (K-39)."""
        headers = {"Authorization": f"Bearer {self._token}"}
        methods = {"set_status_detail": "POST", "input_request": "GET", "trigger_catalog": "GET"}
        return {
            name: {"url": f"{self._base}/{name}", "method": method, "headers": headers}
            for name, method in methods.items()
        }

    def close(self) -> None:
        self._end.close()
        self._thread.join()
        self._server.server_close()
        self.pool.close()

    def __enter__(self) -> LocalApi:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- called by the handler ---------------------------------------------------------------------
    def authorized(self, header: str | None) -> bool:
        expected = f"Bearer {self._token}"
        return header is not None and hmac.compare_digest(header.encode(), expected.encode())

    def set_status_detail(self, body: Any) -> tuple[int, Any]:
        text = body.get("status_detail") if isinstance(body, dict) else None
        if not isinstance(text, str):
            return 400, {"detail": 'The body must be {"status_detail": "text"}.'}
        self._on_status_detail(text[:MAX_DETAIL_CHARACTERS])
        return 200, {"ok": True}

    def input_request(self, input_ids: list[str]) -> tuple[int, Any]:
        unknown = [input_id for input_id in input_ids if input_id not in self._inputs]
        if unknown or not input_ids:
            return 404, {"detail": f"No such input of this execution: {unknown or 'none given'}."}
        files = [file for input_id in input_ids for file in self._inputs[input_id].files]
        grants = self._input_grants([file.id for file in files])
        missing = [file.id for file in files if file.id not in grants.inputs]
        if missing:
            reason = grants.refused.get(missing[0], "the control plane granted no access")
            return 403, {"detail": f"{len(missing)} files cannot be had: {reason}."}
        return 200, [self._described(self._inputs[i], grants) for i in input_ids]

    def file(self, token: str) -> Transfer | None:
        """The permission behind a URL of ours, a fresh one when it has run out. Raises AgentError."""
        file_id, grant = self._served.get(token, ("", None))
        if grant is None or grant.expires_at is None or grant.expires_at > utcnow() + MARGIN:
            return grant
        renewed = self._input_grants([file_id]).inputs.get(file_id, grant)
        self._served[token] = file_id, renewed
        return renewed

    def _described(self, item: JobInput, grants: Grants) -> dict[str, Any]:
        return {
            "files": [
                {
                    "filename": file.name,
                    "url": self._url(file, grants.inputs[file.id]),
                    "input_id": item.input_id,
                }
                for file in item.files
            ]
        }

    def _url(self, file: JobFile, grant: Transfer) -> str:
        if urlsplit(grant.url).scheme != "file" and not grant.headers:
            return grant.url
        token = secrets.token_urlsafe(24)
        self._served[token] = file.id, grant
        return f"{self._base}/files/{token}/{quote(file.name.rpartition('/')[2])}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    timeout = 0  # of `handle_request`, which is only called when there is one
    api: LocalApi

    def server_bind(self) -> None:
        """Without the look-up of our own name, which takes seconds where the DNS does not answer."""
        socketserver.TCPServer.server_bind(self)
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)

    def serve_until(self, ended: socket.socket) -> None:
        """Serves until the other end of `ended` is closed; unlike `serve_forever` it never wakes up in vain."""
        with ended, selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            selector.register(ended, selectors.EVENT_READ)
            while all(key.fileobj is self for key, _ in selector.select()):
                self.handle_request()


class _Handler(BaseHTTPRequestHandler):
    """One request of the command."""

    protocol_version = "HTTP/1.1"
    timeout = 60

    @property
    def api(self) -> LocalApi:
        assert isinstance(self.server, _Server)
        return self.server.api

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path.startswith("/files/"):
            self._send_file(parts.path.split("/")[2])
        elif not self.api.authorized(self.headers.get("Authorization")):
            self._answer(401, {"detail": "Use the headers of api.json."})
        elif parts.path == "/input_request":
            self._guarded(lambda: self.api.input_request(parse_qs(parts.query).get("inputs", [])))
        elif parts.path == "/trigger_catalog":
            self._answer(404, {"detail": NO_CATALOG})
        else:
            self._answer(404, {"detail": "No such endpoint."})

    def do_POST(self) -> None:
        body = self._body()
        if not self.api.authorized(self.headers.get("Authorization")):
            self._answer(401, {"detail": "Use the headers of api.json."})
        elif urlsplit(self.path).path == "/set_status_detail":
            self._guarded(lambda: self.api.set_status_detail(body))
        else:
            self._answer(404, {"detail": "No such endpoint."})

    def _guarded(self, action: Callable[[], tuple[int, Any]]) -> None:
        try:
            status, answer = action()
        except Exception as error:  # noqa: BLE001 - the outermost frame of a request
            log.warning("local API: %s", error, extra={"action": "local-api"})
            words = str(error) if isinstance(error, AgentError) else "The agent failed."
            status, answer = 503, {"detail": words}
        self._answer(status, answer)

    def _body(self) -> Any:
        length = self.headers.get("Content-Length", "0")
        size = int(length) if length.isdigit() else MAX_BODY_BYTES + 1
        if size > MAX_BODY_BYTES:
            self.close_connection = True
            return None
        try:
            return json.loads(self.rfile.read(size) or b"null")
        except ValueError:
            return None

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_file(self, token: str) -> None:
        try:
            grant = self.api.file(token)
        except AgentError as error:
            self._answer(503, {"detail": str(error)})
            return
        if grant is None:
            self._answer(404, {"detail": "No such file."})
            return
        if urlsplit(grant.url).scheme == "file":
            self._send_local(grant)
        else:
            self._relay(grant)

    def _send_local(self, grant: Transfer) -> None:
        try:
            file = file_path(grant.url).open("rb")
        except OSError as error:
            self._answer(404, {"detail": f"The file cannot be read: {error.strerror}."})
            return
        with file:
            self._stream(file, file.seek(0, 2))

    def _stream(self, file: Any, size: int) -> None:
        file.seek(0)
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(size))
        self.end_headers()
        shutil.copyfileobj(file, self.wfile, 1024 * 1024)

    def _relay(self, grant: Transfer) -> None:
        """Fetches on the command's behalf where the request needs headers it must not know, nor another server."""
        host = urlsplit(grant.url).hostname
        begun = False
        try:
            with self.api.pool.request(
                "GET", grant, follow=True, name=f"the file on {host}"
            ) as answer:
                begun = True
                self._pass_on(answer)
        except (Temporary, AgentError) as error:
            self.close_connection = True
            if begun:  # the command sees that the rest is missing
                text = "local API: a file from %s broke off: %s"
                log.warning(text, host, error, extra={"action": "local-api"})
                return
            reason = f"{host} cannot be reached from the worker: {error}"
            self._answer(502, {"detail": f"The file cannot be had: {reason}."})

    def _pass_on(self, answer: Answer) -> None:
        self.close_connection = True
        self.send_response(answer.status)
        self.send_header("Connection", "close")
        if answer.length is not None:  # so that the command sees when the rest is missing
            self.send_header("Content-Length", str(answer.length))
        self.end_headers()
        view = memoryview(bytearray(PIECE_BYTES))
        while count := answer.read_into(view):
            self.wfile.write(view[:count])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Keeps tokens in paths out of the log."""
