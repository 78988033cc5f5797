"""A stand-in for Google Compute Engine: templates, managed instance groups and their machines, over HTTP.

No emulator of managed instance groups exists. This one is checked against the API's published description, both ways
(`discovery.py`), and tokens must be signed by the account's key; how groups and machines behave is written here after
the documentation: members that are being made, stopped and deleted step by step (`settle`), refusals that arrive after
a request was accepted, repeated requests known by their id, machines that come back where repairs are not switched off.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.clouds.discovery import Call, Unacceptable, compute
from tests.support.servers.endpoint import Endpoint

PROJECT, REGION = "project-of-tests", "europe-north1"
ZONES = (f"{REGION}-a", f"{REGION}-b", f"{REGION}-c")
MACHINE_TYPES = ("e2-standard-2", "n1-standard-4")
IMAGES = ("projects/ubuntu-os-cloud/family/ubuntu-2404-lts-amd64",)
SUBNETS = ("workers",)
ROOT = "https://www.googleapis.com/compute/v1"

_LATER = {  # refusals of machines that are being made
    "capacity": ("ZONE_RESOURCE_POOL_EXHAUSTED", "The zone does not have enough resources"),
    "quota": ("QUOTA_EXCEEDED", "Quota 'CPUS' exceeded. Limit: 0.0 in region europe-north1."),
    "invalid": ("RESOURCE_NOT_FOUND", "The image 'no-such-image' was not found"),
}
_AT_ONCE = {  # of all calls
    "throttled": (403, "rateLimitExceeded", "Rate Limit Exceeded"),
    "credentials": (401, "authError", "Invalid Credentials"),
    "outage": (503, "backendError", "Backend Error"),
}


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass(eq=False)
class Machine:
    """A member of a group manager, or, without one, somebody's own."""

    name: str
    zone: str
    properties: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    manager: str | None = None
    action: str = "NONE"
    status: str = "RUNNING"  # empty: not there
    target: str = "RUNNING"
    error: tuple[str, str] | None = None
    made_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    @property
    def alive(self) -> bool:
        return bool(self.status) and self.action != "DELETING"


@dataclass(eq=False)
class Refusal:
    """`room`: machines that can be made before."""

    trouble: str
    zone: str | None = None
    spot: bool | None = None
    room: int = 0


class World:
    """One project."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.templates: dict[str, Mapping[str, Any]] = {}
        self.managers: dict[tuple[str, str], dict[str, Any]] = {}
        self.machines: list[Machine] = []
        self.refusals: list[Refusal] = []
        self.quotas: dict[str, float] = {"CPUS": 24.0}
        self.calls: list[Call] = []
        self._hidden: list[Machine] | None = None
        self._operations: dict[str, dict[str, Any]] = {}
        self._requests: dict[str, dict[str, Any]] = {}
        self._numbers = itertools.count(1)

    def settle(self) -> None:
        """All that is on its way arrives."""
        with self.lock:
            for one in list(self.machines):
                self._arrive(one)

    def _arrive(self, one: Machine) -> None:
        if one.action == "DELETING":
            self.machines.remove(one)
        elif one.manager and not one.status and not one.error and self._repairs(one):
            one.status = "RUNNING"  # made anew, under the same name
        elif one.error is None:
            stops = one.action == "STOPPING"
            one.status = (
                "TERMINATED" if stops else ("RUNNING" if one.action != "NONE" else one.status)
            )
            one.action = "NONE"

    def _repairs(self, one: Machine) -> bool:
        policy = self.managers[one.zone, one.manager or ""].get("instanceLifecyclePolicy", {})
        return policy.get("defaultActionOnFailure", "REPAIR") == "REPAIR"

    def machine(self, name: str) -> Machine:
        return next(one for one in self.machines if one.name == name)

    def vanish(self, name: str) -> None:
        """Reclaimed, or deleted without the group manager's knowing."""
        self.machine(name).status = ""

    @contextmanager
    def lag(self) -> Iterator[None]:
        """Lists stay as they are."""
        self._hidden = []
        try:
            yield
        finally:
            self._hidden = None

    @contextmanager
    def refusing(self, refusal: Refusal) -> Iterator[None]:
        self.refusals.append(refusal)
        try:
            yield
        finally:
            self.refusals.remove(refusal)

    def answer(self, call: Call) -> Mapping[str, Any]:
        with self.lock:
            self.calls.append(call)
            for refusal in self.refusals:
                if refusal.trouble in _AT_ONCE:
                    raise Refused(*_AT_ONCE[refusal.trouble])
            handler = getattr(self, "_" + call.method.replace(".", "_"), None)
            if handler is None:
                raise Refused(501, "notImplemented", f"{call.method} is not modelled")
            return handler(call)

    def _operation(self, call: Call, *, done: bool) -> dict[str, Any]:
        name = f"operation-{next(self._numbers)}"
        operation: dict[str, Any] = {
            "name": name,
            "operationType": call.method,
            "status": "DONE" if done else "RUNNING",
        }
        if "zone" in call.place:
            operation["zone"] = f"{ROOT}/projects/{PROJECT}/zones/{call.place['zone']}"
        self._operations[name] = {**operation, "status": "DONE"}
        return operation

    def _wait(self, call: Call) -> Mapping[str, Any]:
        return self._operations[call.place["operation"]]

    _zoneOperations_wait = _globalOperations_wait = _wait

    # -- templates and group managers ----------------------------------------------------------------------------

    def _instanceTemplates_insert(self, call: Call) -> Mapping[str, Any]:
        name = call.body["name"]
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
            raise Refused(400, "invalid", f"Invalid value for field 'resource.name': {name!r}")
        if name in self.templates:
            raise Refused(409, "alreadyExists", f"The resource {name!r} already exists")
        self.templates[name] = call.body
        return self._operation(call, done=False)

    def _instanceTemplates_delete(self, call: Call) -> Mapping[str, Any]:
        name = call.place["instanceTemplate"]
        if any(_last(one["instanceTemplate"]) == name for one in self.managers.values()):
            raise Refused(400, "resourceInUseByAnotherResource", f"{name!r} is already being used")
        del self.templates[name]
        return self._operation(call, done=False)

    def _instanceGroupManagers_insert(self, call: Call) -> Mapping[str, Any]:
        self._known_template(call)
        self.managers[call.place["zone"], call.body["name"]] = dict(call.body)
        return self._operation(call, done=False)

    def _instanceGroupManagers_setInstanceTemplate(self, call: Call) -> Mapping[str, Any]:
        self._known_template(call)
        self._manager(call)["instanceTemplate"] = call.body["instanceTemplate"]
        return self._operation(call, done=False)

    def _known_template(self, call: Call) -> None:
        if _last(call.body["instanceTemplate"]) not in self.templates:
            raise Refused(404, "notFound", f"{call.body['instanceTemplate']!r} was not found")

    def _instanceGroupManagers_aggregatedList(self, call: Call) -> Mapping[str, Any]:
        found: dict[str, Any] = {
            f"zones/{zone}": {"warning": {"code": "NO_RESULTS_ON_PAGE"}} for zone in ZONES
        }
        for (zone, _), one in self.managers.items():
            if _fits(call, one["name"]):
                place = found.setdefault(f"zones/{zone}", {})
                place.pop("warning", None)
                shown = {**one, "zone": f"{ROOT}/projects/{PROJECT}/zones/{zone}"}
                place.setdefault("instanceGroupManagers", []).append(shown)
        return {"items": found}

    def _manager(self, call: Call) -> dict[str, Any]:
        key = call.place["zone"], call.place["instanceGroupManager"]
        if key not in self.managers:
            raise Refused(404, "notFound", f"The resource {key[1]!r} was not found")
        return self.managers[key]

    def _members(self, call: Call) -> list[Machine]:
        name = self._manager(call)["name"]
        zone = call.place["zone"]
        return [one for one in self.machines if (one.manager, one.zone) == (name, zone)]

    # -- members -------------------------------------------------------------------------------------------------

    def _instanceGroupManagers_createInstances(self, call: Call) -> Mapping[str, Any]:
        request = call.query.get("requestId", "")
        if request in self._requests:
            return self._requests[request]
        manager = self._manager(call)
        taken = {one.name for one in self.machines if one.zone == call.place["zone"]}
        for one in call.body["instances"]:
            if one["name"] in taken:
                raise Refused(400, "invalid", f"The instance {one['name']!r} already exists")
        for one in call.body["instances"]:
            self._create(call.place["zone"], manager, one)
        self._requests[request] = self._operation(call, done=False)
        return self._requests[request]

    def _create(self, zone: str, manager: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        properties = self.templates[_last(manager["instanceTemplate"])]["properties"]
        error = self._error(zone, spot=_spot(properties))
        one = Machine(
            wanted["name"],
            zone,
            properties,
            wanted.get("preservedState", {}).get("metadata", {}),
            manager["name"],
            action="CREATING",
            status="" if error else "PROVISIONING",
            error=error,
        )
        self.machines.append(one)
        if self._hidden is not None:
            self._hidden.append(one)

    def _error(self, zone: str, *, spot: bool) -> tuple[str, str] | None:
        for one in self.refusals:
            here = one.zone in (None, zone) and one.spot in (None, spot)
            if here and one.room:
                one.room -= 1
            elif here and one.trouble in _LATER:
                return _LATER[one.trouble]
        return None

    def _instanceGroupManagers_listManagedInstances(self, call: Call) -> Mapping[str, Any]:
        hidden = self._hidden or []
        shown = [_member(one) for one in self._members(call) if one not in hidden]
        return {"managedInstances": shown} if shown else {}

    def _instanceGroupManagers_deleteInstances(self, call: Call) -> Mapping[str, Any]:
        return self._change(call, "DELETING", "DELETED")

    def _instanceGroupManagers_stopInstances(self, call: Call) -> Mapping[str, Any]:
        self._all_are(call, "RUNNING")
        return self._change(call, "STOPPING", "STOPPED")

    def _instanceGroupManagers_startInstances(self, call: Call) -> Mapping[str, Any]:
        self._all_are(call, "TERMINATED")
        return self._change(call, "STARTING", "RUNNING")

    def _all_are(self, call: Call, status: str) -> None:
        for path in call.body["instances"]:
            one = self.machine(_last(path))
            if (one.status, one.action) != (status, "NONE"):
                raise Refused(400, "invalid", f"The instance {one.name!r} is not {status}")

    def _change(self, call: Call, action: str, target: str) -> Mapping[str, Any]:
        members = {
            f"zones/{one.zone}/instances/{one.name}": one
            for one in self._members(call)
            if one.action != "DELETING"
        }
        for path in call.body["instances"]:
            if path in members:
                members[path].action, members[path].target = action, target
            elif not call.body.get("skipInstancesOnValidationError"):
                raise Refused(400, "invalid", f"The instance {path!r} is not a member")
        return self._operation(call, done=True)

    # -- machines and what they are made of ----------------------------------------------------------------------

    def _instances_get(self, call: Call) -> Mapping[str, Any]:
        for one in self.machines:
            if (one.name, one.zone) == (call.place["instance"], call.place["zone"]) and one.status:
                return _instance(one)
        raise Refused(404, "notFound", f"The resource {call.place['instance']!r} was not found")

    def _instances_aggregatedList(self, call: Call) -> Mapping[str, Any]:
        found = [one for one in self.machines if one.status and _fits(call, one.name)]
        return {"items": {f"zones/{one.zone}": {"instances": [_instance(one)]} for one in found}}

    def _regions_get(self, call: Call) -> Mapping[str, Any]:
        self._found(call.place["region"] == REGION, f"region {call.place['region']}")
        return {
            "name": REGION,
            "zones": [f"{ROOT}/projects/{PROJECT}/zones/{zone}" for zone in ZONES],
            "quotas": [{"metric": key, "limit": value} for key, value in self.quotas.items()],
        }

    def _machineTypes_get(self, call: Call) -> Mapping[str, Any]:
        name = call.place["machineType"]
        self._found(name in MACHINE_TYPES, f"machine type {name}")
        return {"name": name}

    def _machineTypes_aggregatedList(self, call: Call) -> Mapping[str, Any]:
        return {
            "items": {
                f"zones/{zone}": {
                    "machineTypes": [
                        {"name": one, "zone": zone} for one in MACHINE_TYPES if _fits(call, one)
                    ]
                }
                for zone in ZONES
            }
        }

    def _images_getFromFamily(self, call: Call) -> Mapping[str, Any]:
        path = f"projects/{call.place['project']}/family/{call.place['family']}"
        self._found(path in IMAGES, f"image {path}")
        return {"name": f"{call.place['family']}-v1"}

    def _images_get(self, call: Call) -> Mapping[str, Any]:
        raise Refused(404, "notFound", f"The image {call.place['image']!r} was not found")

    def _networks_get(self, call: Call) -> Mapping[str, Any]:
        self._found(call.place["network"] == "default", f"network {call.place['network']}")
        return {"name": call.place["network"]}

    def _subnetworks_get(self, call: Call) -> Mapping[str, Any]:
        self._found(call.place["subnetwork"] in SUBNETS, f"subnet {call.place['subnetwork']}")
        return {"name": call.place["subnetwork"]}

    def _found(self, there: bool, what: str) -> None:
        if not there:
            raise Refused(404, "notFound", f"The {what} was not found")


class Gce(Endpoint):
    """Serves `world`, which a test replaces by a new one. `public_key`: of the account whose tokens are good."""

    def __init__(self, public_key: str) -> None:
        super().__init__(_Handler)
        self.url = f"http://{self.address}"
        self.public_key = public_key
        self.world = World()

    def trusts(self, header: str) -> bool:
        from google.auth.crypt import verify_signature

        content, _, signature = header.removeprefix("Bearer ").rpartition(".")
        raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
        return verify_signature(content.encode(), raw, self.public_key)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        endpoint: Gce = self.server.endpoint  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if not endpoint.trusts(self.headers.get("Authorization", "")):
                raise Refused(*_AT_ONCE["credentials"])
            call = compute().read(self.command, self.path, body)
            answer = endpoint.world.answer(call)
            compute().check_answer(call.method, answer)
            self._send(200, answer)
        except Unacceptable as error:
            self._refuse(400, "invalid", str(error))
        except Refused as error:
            self._refuse(error.status, error.reason, str(error))

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _serve

    def _refuse(self, status: int, reason: str, message: str) -> None:
        errors = [{"message": message, "domain": "global", "reason": reason}]
        self._send(status, {"error": {"code": status, "message": message, "errors": errors}})

    def _send(self, status: int, content: Mapping[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _last(url: str) -> str:
    return url.rpartition("/")[2]


def _spot(properties: Mapping[str, Any]) -> bool:
    return properties["scheduling"]["provisioningModel"] == "SPOT"


def _fits(call: Call, name: str) -> bool:
    """The filters that are used here: one name, or one of several."""
    wanted = call.query.get("filter")
    return wanted is None or name in re.findall(r'name = "([^"]*)"', wanted)


def _member(one: Machine) -> Mapping[str, Any]:
    shown: dict[str, Any] = {
        "instance": f"{ROOT}/projects/{PROJECT}/zones/{one.zone}/instances/{one.name}",
        "name": one.name,
        "currentAction": one.action,
        "targetStatus": one.target,
        "preservedStateFromConfig": {"metadata": dict(one.metadata)},
    }
    if one.status:
        shown["instanceStatus"] = one.status
    if one.error:
        code, message = one.error
        shown["lastAttempt"] = {"errors": {"errors": [{"code": code, "message": message}]}}
    return shown


def _instance(one: Machine) -> Mapping[str, Any]:
    return {
        "name": one.name,
        "zone": f"{ROOT}/projects/{PROJECT}/zones/{one.zone}",
        "status": one.status,
        "creationTimestamp": one.made_at.isoformat(timespec="milliseconds"),
        "labels": dict(one.properties.get("labels", {})),
        "metadata": {"items": [{"key": k, "value": v} for k, v in one.metadata.items()]},
    }
