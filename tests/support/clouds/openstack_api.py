"""A stand-in for OpenStack: tokens of Keystone, servers of Nova, and as much of Glance and Neutron as names need.

Written after the API references of the services. Requests for servers are checked against what Nova's reference allows
(names and types of fields, microversion 2.96); states are as Nova has them: a server is `BUILD` and `scheduling` first,
a scheduler that finds no host makes it `ERROR` with a fault later, and deleted servers are listed to those who ask for
changes. The contract suite runs against real servers too, see `rigs/openstack.py`; this stand-in is for every day.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.servers.endpoint import Endpoint

USER, PASSWORD, PROJECT = "scaler", "s3cret-password", "vision"
APPLICATION, APPLICATION_SECRET = "a1b2c3", "s3cret-application"
REGION, ZONES, QUOTA = "two", ("north", "south"), 10

_NAMES = {"flavors": "small", "images": "ubuntu", "networks": "machines"}
_NAMES["security-groups"] = "egress"
IDS = {kind: str(uuid.uuid5(uuid.NAMESPACE_OID, kind)) for kind in _NAMES}

# Fields of a server in a request, and what they are.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "flavorRef": str,
    "imageRef": str,
    "networks": (str, list),
    "metadata": dict,
    "availability_zone": str,
    "security_groups": list,
    "user_data": str,
    "block_device_mapping_v2": list,
}


class Refusal(Exception):
    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class OpenStack(Endpoint):
    """`refuse` is asked before every call with its method and path; what it raises is the answer."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.servers: dict[str, dict[str, Any]] = {}
        self.full: dict[str, int] = {}  # zones without room but for so many; "" for all
        self.missing: set[str] = set()  # kinds of things that cannot be found just now
        self.quota = QUOTA
        self.refuse: Callable[[str, str], None] = lambda method, path: None
        self.auth_url = f"http://{self.address}/identity/v3"

    def reset(self) -> None:
        self.servers.clear()
        self.full.clear()
        self.missing.clear()
        self.quota = QUOTA
        self.refuse = lambda method, path: None

    def settle(self) -> None:
        after = {"powering-off": "SHUTOFF", "powering-on": "ACTIVE", "deleting": "DELETED"}
        for server in self.servers.values():
            task = server["OS-EXT-STS:task_state"]
            if server["status"] == "BUILD":
                self._place(server)
            if server["status"] == "BUILD":
                server["status"] = "ACTIVE"
                server["OS-SRV-USG:launched_at"] = _now()[:-1]
            elif task in after:
                server["status"] = after[task]
            server["OS-EXT-STS:task_state"] = None

    # -- answers -----------------------------------------------------------------------------------
    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        self.refuse(method, path)
        service, _, rest = path.strip("/").partition("/")
        parts = rest.split("/")
        if service == "identity":
            return self._identity(parts)
        if service == "compute":
            return self._compute(method, parts[1:], query, body)
        return self._named(parts[1:], query)

    def token(self, body: Any) -> dict[str, Any]:
        identity = body["auth"]["identity"]
        if identity["methods"] == ["application_credential"]:
            found = identity["application_credential"]
            right = (found["id"], found["secret"]) == (APPLICATION, APPLICATION_SECRET)
        else:
            found = identity["password"]["user"]
            scope = body["auth"]["scope"]["project"]["name"]
            right = (found["name"], found["password"], scope) == (USER, PASSWORD, PROJECT)
        if not right:
            raise Refusal(401, "The request you have made requires authentication.")
        places = {"identity": "identity/v3", "compute": "compute/v2.1"}
        places |= {"image": "image", "network": "network"}
        endpoints = [
            {
                "type": kind,
                "name": kind,
                "id": kind,
                "endpoints": [
                    {
                        "id": kind,
                        "interface": "public",
                        "region": REGION,
                        "region_id": REGION,
                        "url": f"http://{self.address}/{place}",
                    }
                ],
            }
            for kind, place in places.items()
        ]
        domain = {"id": "default", "name": "Default"}
        return {
            "token": {
                "methods": ["password"],
                "expires_at": "2099-01-01T00:00:00.000000Z",
                "issued_at": "2026-01-01T00:00:00.000000Z",
                "user": {"id": "u", "name": USER, "domain": domain},
                "project": {"id": "p", "name": PROJECT, "domain": domain},
                "roles": [],
                "catalog": endpoints,
            }
        }

    def _identity(self, parts: list[str]) -> Any:
        link = {"rel": "self", "href": f"http://{self.address}/identity/v3/"}
        return {"version": {"id": "v3.14", "status": "stable", "links": [link]}}

    def versions(self, service: str, ident: str, place: str) -> Any:
        link = {"rel": "self", "href": f"http://{self.address}/{service}/{place}/"}
        return {"versions": [{"id": ident, "status": "CURRENT", "links": [link]}]}

    def _compute(self, method: str, parts: list[str], query: dict[str, str], body: Any) -> Any:
        if parts in ([], [""]):
            link = {"rel": "self", "href": f"http://{self.address}/compute/v2.1/"}
            version = {"id": "v2.1", "status": "CURRENT", "links": [link]}
            return {"version": {**version, "version": "2.96", "min_version": "2.1"}}
        if parts[0] == "servers":
            return self._servers(method, parts[1:], query, body)
        if parts[0] == "os-availability-zone":
            state = {"available": True}
            zones = [{"zoneName": zone, "zoneState": state, "hosts": None} for zone in ZONES]
            return {"availabilityZoneInfo": zones}
        if parts[0] == "limits":
            used = len([one for one in self.servers.values() if one["status"] != "DELETED"])
            absolute = {"maxTotalInstances": self.quota, "totalInstancesUsed": used}
            return {"limits": {"rate": [], "absolute": absolute}}
        return self._named(parts, query)

    def _named(self, parts: list[str], query: dict[str, str]) -> Any:
        """The one thing that there is of each kind, by its id or name."""
        kind, name = parts[0], _NAMES[parts[0]]
        here = kind not in self.missing
        thing = {"id": IDS[kind], "name": name, "disk": 10, "ram": 64, "vcpus": 1}
        if len(parts) > 1 and parts[1] != "detail":
            if not here or parts[1] != thing["id"]:
                raise Refusal(404, f"{kind}: no {parts[1]}")
            return thing if kind == "images" else {kind.rstrip("s").replace("-", "_"): thing}
        wanted = query.get("name", name) == name
        return {kind.replace("-", "_"): [thing] if here and wanted else []}

    # -- servers -----------------------------------------------------------------------------------
    def _servers(self, method: str, parts: list[str], query: dict[str, str], body: Any) -> Any:
        if method == "POST" and not parts:
            return self._create(body["server"])
        if parts in (["detail"], []):
            every = "changes-since" in query
            found = [one for one in self.servers.values() if every or one["status"] != "DELETED"]
            return {"servers": [_shown(one) for one in found]}
        server = self.servers.get(parts[0])
        if server is None or server["status"] == "DELETED":
            raise Refusal(404, f"Instance {parts[0]} could not be found.")
        if method == "GET":
            self._place(server)
            return {"server": server}
        if method == "DELETE" and not parts[1:]:
            server["OS-EXT-STS:task_state"] = "deleting"
            return None
        if parts[1:2] == ["metadata"]:
            return self._mark(method, server["metadata"], parts[2:], body)
        (action,) = body
        before, task = {"os-stop": ("ACTIVE", "powering-off"), "os-start": ("SHUTOFF", "powering-on")}[action]  # fmt: skip
        if server["status"] != before:
            raise Refusal(409, f"Cannot '{action[3:]}' instance while it is in vm_state")
        server["OS-EXT-STS:task_state"] = task
        return None

    def _mark(self, method: str, marks: dict[str, str], key: list[str], body: Any) -> Any:
        if method == "POST":
            marks.update(body["metadata"])
            return {"metadata": marks}
        if marks.pop(key[0], None) is None:
            raise Refusal(404, "Metadata item was not found")
        return None

    def _create(self, asked: dict[str, Any]) -> Any:
        self._check(asked)
        used = len([one for one in self.servers.values() if one["status"] != "DELETED"])
        if used >= self.quota:
            text = f"Quota exceeded for instances: Requested 1, but already used {used} of {self.quota} instances"
            raise Refusal(403, text)
        server = self.add(asked["name"], asked.get("metadata", {}))
        server["OS-EXT-AZ:availability_zone"] = asked.get("availability_zone", "")
        server["OS-EXT-SRV-ATTR:user_data"] = asked.get("user_data")
        return {"server": {"id": server["id"], "links": [], "adminPass": "never-shown"}}

    def add(self, name: str, metadata: dict[str, str]) -> dict[str, Any]:
        server = {
            "id": str(uuid.uuid4()),
            "name": name,
            "status": "BUILD",
            "metadata": metadata,
            "created": _now(),
            "updated": _now(),
            "links": [],
            "OS-EXT-STS:task_state": "scheduling",
            "OS-SRV-USG:launched_at": None,
            "OS-EXT-AZ:availability_zone": "",
        }
        self.servers[server["id"]] = server
        return server

    def _place(self, server: dict[str, Any]) -> None:
        """What the scheduler finds out."""
        if server["OS-EXT-STS:task_state"] != "scheduling":
            return
        zone = server["OS-EXT-AZ:availability_zone"]
        full = next((one for one in (zone, "") if one in self.full), None)
        if full is not None and self.full[full]:
            self.full[full] -= 1
            full = None
        if full is not None:
            server["status"], server["OS-EXT-STS:task_state"] = "ERROR", None
            server["fault"] = {
                "code": 500,
                "created": _now(),
                "message": "No valid host was found. There are not enough hosts available.",
            }
        else:
            server["OS-EXT-STS:task_state"] = "spawning"

    def _check(self, asked: dict[str, Any]) -> None:
        for key, value in asked.items():
            if key not in _FIELDS:
                raise Refusal(
                    400, f"Additional properties are not allowed ({key!r} was unexpected)"
                )
            if not isinstance(value, _FIELDS[key]):
                raise Refusal(400, f"Invalid input for field/attribute {key}")
        for required in ("name", "flavorRef", "networks"):
            if required not in asked:
                raise Refusal(400, f"{required!r} is a required property")
        if not ("imageRef" in asked) ^ ("block_device_mapping_v2" in asked):
            raise Refusal(400, "Block Device Mapping is Invalid")
        pairs = asked.get("metadata", {}).items()
        if any(not isinstance(v, str) or len(k) > 255 or len(v) > 255 for k, v in pairs):
            raise Refusal(400, "Invalid input for field/attribute metadata")
        if len(asked.get("user_data", "")) > 65535:
            raise Refusal(400, "Invalid input for field/attribute user_data")
        base64.b64decode(asked.get("user_data", ""), validate=True)
        if asked.get("availability_zone", ZONES[0]) not in ZONES:
            raise Refusal(400, "The requested availability zone is not available")


def _shown(server: dict[str, Any]) -> dict[str, Any]:
    """A deleted one has no metadata any more."""
    return {**server, "metadata": {}} if server["status"] == "DELETED" else server


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is sent in one piece

    def log_message(self, format: str, *args: Any) -> None:
        """Tests say what they want to see."""

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        cloud: OpenStack = self.server.endpoint  # pyright: ignore[reportAttributeAccessIssue]
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(content) if content else None
        try:
            if url.path == "/identity/v3/auth/tokens":
                cloud.refuse(method, url.path)
                return self._send(201, cloud.token(body), {"X-Subject-Token": "t0ken"})
            if url.path.rstrip("/") == "/image":
                return self._send(200, cloud.versions("image", "v2.16", "v2"))
            if url.path.rstrip("/") == "/network":
                return self._send(200, cloud.versions("network", "v2.0", "v2.0"))
            if self.headers.get("X-Auth-Token") != "t0ken" and not url.path.startswith("/identity"):
                raise Refusal(401, "The request you have made requires authentication.")
            found = cloud.answer(method, url.path, query, body)
            return self._send(202 if found is None or method == "POST" else 200, found)
        except Refusal as refusal:
            named = {"code": refusal.status, "message": refusal.message, "title": "No"}
            key = "error" if url.path.startswith("/identity") else "forbidden"
            return self._send(refusal.status, {key: named}, refusal.headers)

    def _send(self, status: int, found: Any, headers: dict[str, str] | None = None) -> None:
        content = b"" if found is None else json.dumps(found).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
