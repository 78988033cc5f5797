"""A stand-in for Keystone that speaks its token API (version 3) in front of the tests' Swift.

It checks user, password and project or application credential as they are sent, and hands out a token that Swift's own
TempAuth has issued, with a catalogue of two regions; only the second one's Swift is there. Domains, scopes and the life
of tokens are taken from the request as they come.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.servers.endpoint import Endpoint
from tests.support.servers.kinds import SwiftServer
from tests.support.servers.stores import swift_token

USER, PASSWORD, PROJECT, REGION = "trainer", "s3cret-password", "vision", "two"
APPLICATION, APPLICATION_SECRET = "a1b2c3", "s3cret-application"


class Keystone(Endpoint):
    """`issued` counts the tokens."""

    def __init__(self, swift: SwiftServer) -> None:
        super().__init__(_Handler)
        self.swift = swift
        self.issued = 0
        self.auth_url = f"http://{self.address}/v3"

    def token(self) -> dict[str, Any]:
        self.issued += 1
        return {
            "token": {
                "methods": ["password"],
                "expires_at": "2099-01-01T00:00:00.000000Z",
                "issued_at": "2026-01-01T00:00:00.000000Z",
                "user": {"id": "u", "name": USER, "domain": {"id": "default", "name": "Default"}},
                "project": {
                    "id": "p",
                    "name": PROJECT,
                    "domain": {"id": "default", "name": "Default"},
                },
                "roles": [],
                "catalog": [self._catalogue()],
            }
        }

    def _catalogue(self) -> dict[str, Any]:
        addresses = {"one": "http://127.0.0.1:9/v1/AUTH_test", REGION: self.swift.storage_url}
        return {
            "type": "object-store",
            "name": "swift",
            "id": "s",
            "endpoints": [
                {
                    "id": region,
                    "interface": "public",
                    "region": region,
                    "region_id": region,
                    "url": url,
                }
                for region, url in addresses.items()
            ],
        }


def _known(request: dict[str, Any]) -> bool:
    identity = request["auth"]["identity"]
    if identity["methods"] == ["application_credential"]:
        application = identity["application_credential"]
        return (application["id"], application["secret"]) == (APPLICATION, APPLICATION_SECRET)
    user = identity["password"]["user"]
    project = request["auth"]["scope"]["project"]
    named = (user["name"], user["password"], user["domain"]["name"], project["name"])
    return named == (USER, PASSWORD, "Default", PROJECT)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        keystone: Keystone = self.server.endpoint  # pyright: ignore[reportAttributeAccessIssue]
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v3/auth/tokens":
            self._answer(404, {"error": {"code": 404, "message": "not here"}})
        elif not _known(request):
            self._answer(401, {"error": {"code": 401, "message": "wrong name or password"}})
        else:
            self._answer(201, keystone.token(), token=swift_token(keystone.swift))

    def _answer(self, status: int, content: dict[str, Any], *, token: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if token:
            self.send_header("X-Subject-Token", token)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
