"""Where the emulators' service account gets its access tokens: a stand-in for Google's OAuth endpoint.

The emulators take any token; what is real here is that the client asks for one with an assertion it has signed.
"""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler

from tests.support.servers.endpoint import Endpoint

_ANSWER = b'{"access_token": "of-the-tests", "expires_in": 3600, "token_type": "Bearer"}'


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(_ANSWER)))
        self.end_headers()
        self.wfile.write(_ANSWER)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class TokenEndpoint(Endpoint):
    """Answers every request with the same token."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.url = f"http://{self.address}/token"
