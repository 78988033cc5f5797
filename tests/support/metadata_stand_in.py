"""Metadata services of clouds, as their documentation tells them, on a port of this host.

No emulator of them exists that this project could use. What is checked of requests is what the real ones refuse: a
missing token (AWS, IMDSv2 only), a missing header (Google Cloud, Azure), a missing version (Azure).
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

MACHINE = "group-vm_3"


class MetadataStandIn:
    """All three at one address. The attributes are what they tell; `acknowledged` is what Azure was told."""

    def __init__(self) -> None:
        self.aws_action: dict[str, str] | None = None
        self.google = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.azure_events: list[dict[str, Any]] = []
        self.acknowledged: list[str] = []
        self.broken = False
        self.refused: list[str] = []
        self.tokens: set[str] = set()
        self.looked = threading.Event()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stand_in._answer(self)

            do_PUT = do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> MetadataStandIn:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        if self.broken:
            status, text = 503, "busy"
        else:
            status, text = self._route(request, body)
        if status >= 400 and status not in (404, 503):
            self.refused.append(f"{request.command} {request.path}: {status}")
        content = text.encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)
        self.looked.set()

    def _route(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, str]:
        path = urlsplit(request.path).path
        if path.startswith("/latest/"):
            return self._aws(request, path)
        if path.startswith("/computeMetadata/v1/instance/"):
            if request.headers.get("Metadata-Flavor") != "Google":
                return 403, "Missing Metadata-Flavor:Google header."
            found = self.google.get(path.rsplit("/", 1)[1])
            return (200, found) if found is not None else (404, "")
        return self._azure(request, path, body)

    def _aws(self, request: BaseHTTPRequestHandler, path: str) -> tuple[int, str]:
        if path == "/latest/api/token" and request.command == "PUT":
            life = request.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
            if life is None or not 1 <= int(life) <= 21600:
                return 400, "Bad Request"
            self.tokens.add(token := f"token-{len(self.tokens)}")
            return 200, token
        if request.headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            return 401, "Unauthorized"
        if path != "/latest/meta-data/spot/instance-action" or self.aws_action is None:
            return 404, "Not Found"
        return 200, json.dumps(self.aws_action)

    def _azure(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> tuple[int, str]:
        query = parse_qs(urlsplit(request.path).query)
        if request.headers.get("Metadata") != "true" or "api-version" not in query:
            return 400, "Bad request"
        if path == "/metadata/instance/compute/name":
            return (200, MACHINE) if query.get("format") == ["text"] else (400, "Bad request")
        if path != "/metadata/scheduledevents":
            return 404, ""
        if request.command == "POST":
            self.acknowledged += [one["EventId"] for one in json.loads(body)["StartRequests"]]
            return 200, ""
        return 200, json.dumps({"DocumentIncarnation": 1, "Events": self.azure_events})
