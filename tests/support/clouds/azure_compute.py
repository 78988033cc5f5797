"""A stand-in for Azure's Resource Manager, as far as virtual machines in scale sets go, over HTTPS.

No emulator of scale sets exists. Bodies of requests and answers are checked against the models of azure-mgmt-compute
(`azure_models.py`), so that client and check are of one origin; how scale sets and machines behave is written here
after the documentation. Tokens come from its own endpoint, by the real credential of azure-identity.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.clouds.azure_models import Unacceptable, check
from tests.support.servers.endpoint import Endpoint
from tests.support.tls import Certificate, speak_tls

SUBSCRIPTION, PLACE, REGION = (
    "00000000-0000-0000-0000-000000000001",
    "group-of-tests",
    "northeurope",
)
TENANT, CLIENT, SECRET = "11111111-0000-0000-0000-000000000001", "app-of-tests", "secret-of-tests"
ZONES = ("1", "2", "3")
SIZES = ("Standard_D2s_v5", "Standard_NC4as_T4_v3")
SUBNET = (
    f"/subscriptions/{SUBSCRIPTION}/resourceGroups/{PLACE}/providers/Microsoft.Network"
    "/virtualNetworks/network/subnets/workers"
)
_COMPUTE = f"/subscriptions/{SUBSCRIPTION}/resourcegroups/{PLACE}/providers/microsoft.compute"
_REGIONAL = f"/subscriptions/{SUBSCRIPTION}/providers/microsoft.compute"
_NAME = r"/([\w-]+)"

Answer = tuple[int, Any, Mapping[str, str]]


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


_AT_ONCE = {  # of all calls
    "throttled": (429, "TooManyRequests", "The request is being throttled"),
    "credentials": (401, "ExpiredAuthenticationToken", "The access token has expired"),
    "outage": (503, "ServiceUnavailable", "The service is unavailable"),
}
_OF_LAUNCHES = {
    "quota": (
        409,
        "OperationNotAllowed",
        "Operation could not be completed as it results in exceeding approved Total Regional Cores quota.",
    ),
    "invalid": (404, "PlatformImageNotFound", "The platform image is not available"),
}


@dataclass(eq=False)
class Machine:
    """`power`: empty until the cloud has found a place for it."""

    name: str
    body: Mapping[str, Any]
    provisioning: str = "Succeeded"
    power: str = "running"
    error: tuple[str, str] | None = None
    made_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    @property
    def alive(self) -> bool:
        return self.provisioning not in ("Deleting", "Failed")


@dataclass(eq=False)
class Refusal:
    """`room`: machines that can be made before."""

    trouble: str
    zone: str | None = None
    spot: bool | None = None
    room: int = 0


@dataclass(frozen=True)
class Request:
    verb: str
    path: str  # in lower case
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    names: tuple[str, ...] = ()


class World:
    """One resource group."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.sets: dict[str, dict[str, Any]] = {}
        self.machines: dict[str, Machine] = {}
        self.refusals: list[Refusal] = []
        self.quotas: dict[str, int] = {"standardDSv5Family": 10, "lowPriorityCores": 10}
        self.group_only = (
            False  # whoever calls has rights in the resource group, not in the subscription
        )
        self.requests: list[Request] = []
        self._hidden: set[str] | None = None
        self._numbers = itertools.count(1)
        self._routes: list[tuple[str, re.Pattern[str], Callable[[Request], Answer]]] = [
            (verb, re.compile(pattern), answer)
            for verb, pattern, answer in (
                ("GET", rf"{_COMPUTE}/virtualmachinescalesets", self._list_sets),
                ("GET", rf"{_COMPUTE}/virtualmachinescalesets{_NAME}", self._get_set),
                ("PUT", rf"{_COMPUTE}/virtualmachinescalesets{_NAME}", self._put_set),
                ("GET", rf"{_COMPUTE}/virtualmachines", self._list),
                ("GET", rf"{_COMPUTE}/virtualmachines{_NAME}", self._get),
                ("PUT", rf"{_COMPUTE}/virtualmachines{_NAME}", self._put),
                ("DELETE", rf"{_COMPUTE}/virtualmachines{_NAME}", self._delete),
                ("POST", rf"{_COMPUTE}/virtualmachines{_NAME}/(deallocate|start)", self._switch),
                ("GET", rf"{_REGIONAL}/locations{_NAME}/operations{_NAME}", self._operation),
                ("GET", rf"{_REGIONAL}/skus", self._skus),
                ("GET", rf"{_REGIONAL}/locations{_NAME}/usages", self._usages),
                ("GET", rf"{_REGIONAL}/locations/.*/skus/([\w-]+)/versions", self._images),
                ("GET", r"/subscriptions/.*/virtualnetworks/.*/subnets/.*", self._subnet),
            )
        ]

    def answer(self, request: Request) -> Answer:
        with self.lock:
            self.requests.append(request)
            for refusal in self.refusals:
                if refusal.trouble in _AT_ONCE:
                    raise Refused(*_AT_ONCE[refusal.trouble], **{"Retry-After": "7"})
            if "api-version" not in request.query:
                raise Refused(400, "MissingApiVersionParameter", "api-version is required")
            place = re.match(r"/subscriptions/[^/]+/resourcegroups/([^/]+)/", request.path)
            if place and place[1] != PLACE:
                raise Refused(404, "ResourceGroupNotFound", f"{place[1]!r} could not be found.")
            if self.group_only and not place and "/operations/" not in request.path:
                raise Refused(403, "AuthorizationFailed", "The client has no authorization.")
            for verb, pattern, answer in self._routes:
                match = pattern.fullmatch(request.path)
                if match and verb == request.verb:
                    return answer(Request(**{**vars(request), "names": match.groups()}))
        raise Refused(404, "InvalidResourceType", f"{request.verb} {request.path} is not modelled")

    def settle(self) -> None:
        """All that is on its way arrives."""
        with self.lock:
            for one in list(self.machines.values()):
                if one.provisioning == "Deleting":
                    del self.machines[one.name]
                elif one.provisioning != "Failed":
                    one.provisioning = "Succeeded"
                    one.power = {"deallocating": "deallocated", "starting": "running"}.get(
                        one.power, one.power
                    )

    def vanish(self, name: str) -> None:
        """Evicted, or deleted by somebody."""
        del self.machines[name]

    @contextmanager
    def lag(self) -> Iterator[None]:
        """Lists stay as they are."""
        self._hidden = set()
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

    # -- scale sets ----------------------------------------------------------------------------------------------

    def _list_sets(self, request: Request) -> Answer:
        return 200, {"value": [self._shown_set(one) for one in self.sets.values()]}, {}

    def _get_set(self, request: Request) -> Answer:
        return 200, self._shown_set(self._set(request.names[0])), {}

    def _set(self, name: str) -> dict[str, Any]:
        if name not in self.sets:
            raise _not_found(f"virtualMachineScaleSets/{name}")
        return self.sets[name]

    def _shown_set(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        properties = {**body["properties"], "provisioningState": "Succeeded"}
        return _shown("VirtualMachineScaleSet", {**body, "properties": properties})

    def _put_set(self, request: Request) -> Answer:
        check("VirtualMachineScaleSet", request.body)
        name, old = request.names[0], self.sets.get(request.names[0])
        if old and not set(old.get("zones", ())) <= set(request.body.get("zones", ())):
            raise Refused(400, "InvalidParameter", "Zones cannot be removed from a scale set")
        self.sets[name] = {**request.body, "name": name}
        address = f"https://{request.headers['Host']}{_REGIONAL}/locations/{REGION}/operations"
        header = f"{address}/{next(self._numbers)}?api-version=1"
        shown = self._shown_set(self.sets[name])
        return (200 if old else 201), shown, {"Azure-AsyncOperation": header}

    def _operation(self, request: Request) -> Answer:
        return 200, {"status": "Succeeded"}, {}

    # -- machines ------------------------------------------------------------------------------------------------

    def _list(self, request: Request) -> Answer:
        wanted = re.fullmatch(
            r"'virtualMachineScaleSet/id' eq '.*/([^/]+)'", request.query.get("$filter", "")
        )
        if wanted is None:
            raise Refused(400, "InvalidParameter", "instanceView needs a filter by scale set")
        self._set(wanted[1])
        hidden = self._hidden or set()
        shown = [
            self._machine(one, view=True)
            for one in self.machines.values()
            if _home(one.body) == wanted[1] and one.name not in hidden
        ]
        return 200, {"value": shown}, {}

    def _get(self, request: Request) -> Answer:
        return 200, self._machine(self._found(request), view=False), {}

    def _found(self, request: Request) -> Machine:
        if request.names[0] not in self.machines:
            raise _not_found(f"virtualMachines/{request.names[0]}")
        return self.machines[request.names[0]]

    def _put(self, request: Request) -> Answer:
        check("VirtualMachine", request.body)
        name, body = request.names[0], request.body
        if name in self.machines:
            if request.headers.get("If-None-Match") == "*":
                raise Refused(412, "PreconditionFailed", f"{name} exists")
            raise Refused(409, "PropertyChangeNotAllowed", "customData must not be changed")
        self._check_place(body)
        error = self._error(body)
        self.machines[name] = Machine(
            name,
            body,
            provisioning="Failed" if error else "Creating",
            power="" if error else "starting",
            error=error,
        )
        if self._hidden is not None:
            self._hidden.add(name)
        return 201, self._machine(self.machines[name], view=False), {}

    def _check_place(self, body: Mapping[str, Any]) -> None:
        zones = self._set(_home(body)).get("zones", [])
        if set(body.get("zones", ())) - set(zones) or (zones and "zones" not in body):
            raise Refused(400, "InvalidParameter", "The zone is none of the scale set's")
        interfaces = body["properties"]["networkProfile"]["networkInterfaceConfigurations"]
        for one in interfaces:
            for address in one["properties"]["ipConfigurations"]:
                if address["properties"]["subnet"]["id"] != SUBNET:
                    raise Refused(404, "InvalidResourceReference", "There is no such subnet")

    def _error(self, body: Mapping[str, Any]) -> tuple[str, str] | None:
        """Raises what is refused at once."""
        zone, spot = next(iter(body.get("zones", ())), None), _spot(body)
        for one in self.refusals:
            here = one.zone in (None, zone) and one.spot in (None, spot)
            if here and one.room:
                one.room -= 1
                continue
            if here and one.trouble in _OF_LAUNCHES:
                raise Refused(*_OF_LAUNCHES[one.trouble])
            if here and one.trouble == "capacity":
                if spot:
                    raise Refused(409, "SkuNotAvailable", "The requested size is not available")
                code = "ZonalAllocationFailed" if zone else "AllocationFailed"
                return code, "We do not have sufficient capacity for the requested VM size."
        return None

    def _delete(self, request: Request) -> Answer:
        self._found(request).provisioning = "Deleting"
        return 202, None, {}

    def _switch(self, request: Request) -> Answer:
        one = self._found(request)
        wanted, done = {
            "deallocate": ("deallocating", "deallocated"),
            "start": ("starting", "running"),
        }[request.names[1]]
        if one.power != done:
            one.power = wanted
        return 202, None, {}

    def _machine(self, one: Machine, *, view: bool) -> Mapping[str, Any]:
        system = dict(one.body["properties"].get("osProfile", {}))
        system.pop("customData", None)  # never shown
        properties = {
            **one.body["properties"],
            "osProfile": system,
            "provisioningState": one.provisioning,
            "timeCreated": one.made_at.isoformat(),
        }
        if view:
            properties["instanceView"] = {"statuses": _statuses(one)}
        return _shown("VirtualMachine", {**one.body, "name": one.name, "properties": properties})

    # -- what there is in a region -------------------------------------------------------------------------------

    def _skus(self, request: Request) -> Answer:
        here = request.query.get("$filter") == f"location eq '{REGION}'"
        skus = [
            {
                "resourceType": "virtualMachines",
                "name": size,
                "family": "standardDSv5Family",
                "locations": [REGION],
                "locationInfo": [{"location": REGION, "zones": ["1", "2", "3"]}],
                "restrictions": [],
            }
            for size in (SIZES if here else ())
        ]
        for one in skus:
            check("ResourceSku", one)
        return 200, {"value": skus}, {}

    def _usages(self, request: Request) -> Answer:
        usages = [
            {
                "unit": "Count",
                "currentValue": 0,
                "limit": limit,
                "name": {"value": name, "localizedValue": f"{name} vCPUs"},
            }
            for name, limit in self.quotas.items()
        ]
        for one in usages:
            check("Usage", one)
        return 200, {"value": usages}, {}

    def _images(self, request: Request) -> Answer:
        if not request.names[0].startswith("server"):
            raise Refused(404, "NotFound", f"Artifact {request.names[0]} was not found")
        return 200, [_shown("VirtualMachineImageResource", {"name": "1", "location": REGION})], {}

    def _subnet(self, request: Request) -> Answer:
        if request.path != SUBNET.lower():
            raise _not_found(request.path.rpartition("/")[2])
        return 200, {"id": SUBNET}, {}


class AzureCompute(Endpoint):
    """Serves `world`, which a test replaces by a new one, and tokens for its one app registration."""

    def __init__(self, certificate: Certificate) -> None:
        super().__init__(_Handler)
        speak_tls(self.server, certificate)
        self.url = f"https://{self.address}"
        self.world = World()

    def sign_in(self, path: str, body: str) -> Answer:
        tenant = path.split("/")[1]
        if path.endswith("/.well-known/openid-configuration"):
            base = f"{self.url}/{tenant}"
            return (
                200,
                {
                    "issuer": f"{base}/v2.0",
                    "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                    "token_endpoint": f"{base}/oauth2/v2.0/token",
                },
                {},
            )
        form = {key: values[0] for key, values in parse_qs(body).items()}
        refused = any(one.trouble == "credentials" for one in self.world.refusals)
        if refused or (tenant, form.get("client_secret")) != (TENANT, SECRET):
            words = "AADSTS7000215: Invalid client secret provided."
            return 401, {"error": "invalid_client", "error_description": words}, {}
        if form.get("scope") != f"{self.url}/.default":
            return 400, {"error": "invalid_scope", "error_description": "AADSTS70011"}, {}
        return 200, {"token_type": "Bearer", "expires_in": 3600, "access_token": "of-the-tests"}, {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        endpoint: AzureCompute = self.server.endpoint  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        url = urlsplit(self.path)
        try:
            if not url.path.startswith("/subscriptions/"):
                self._send(endpoint.sign_in(url.path, body))
                return
            if self.headers.get("Authorization") != "Bearer of-the-tests":
                raise Refused(401, "InvalidAuthenticationToken", "The token is invalid")
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            path = unquote(url.path).lower()
            content = json.loads(body) if body else {}
            request = Request(self.command, path, query, dict(self.headers), content)
            self._send(endpoint.world.answer(request))
        except Unacceptable as error:
            self._refuse(Refused(400, "InvalidRequestContent", str(error)))
        except Refused as error:
            self._refuse(error)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _serve

    def _refuse(self, error: Refused) -> None:
        content = {"error": {"code": error.code, "message": str(error)}}
        self._send((error.status, content, error.headers))

    def _send(self, answer: Answer) -> None:
        status, content, headers = answer
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _not_found(what: str) -> Refused:
    return Refused(404, "ResourceNotFound", f"The resource {what!r} was not found.")


def _home(body: Mapping[str, Any]) -> str:
    home = body["properties"].get("virtualMachineScaleSet", {}).get("id", "")
    return home.rpartition("/")[2]


def _spot(body: Mapping[str, Any]) -> bool:
    return body["properties"].get("priority") == "Spot"


def _statuses(one: Machine) -> list[Mapping[str, str]]:
    state = f"ProvisioningState/{one.provisioning.lower()}"
    if one.error:
        return [{"code": f"{state}/{one.error[0]}", "message": one.error[1]}]
    power = [{"code": f"PowerState/{one.power}"}] if one.power else []
    return [{"code": state}, *power]


def _shown(kind: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        check(kind, body)
    except Unacceptable as error:
        raise AssertionError(f"the stand-in itself is wrong: {error}") from None
    return body
