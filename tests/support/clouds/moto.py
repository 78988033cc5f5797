"""EC2 and Auto Scaling by moto, and what moto lacks of them: `python -m tests.support.clouds.moto PORT`.

Added or put right, each as the API reference of AWS has it:

- LaunchInstances of Auto Scaling (moto has none): synchronous, in one zone, idempotent by its token, refused for groups
  of several zones without one, for mixtures of spot and on demand, and beyond the maximum;
- CreateLaunchTemplateVersion takes user data (moto fails), DeleteLaunchTemplateVersions exists;
- quotas of EC2 are those that a test sets (moto knows none);
- instances launched are `pending` until the test settles them, and carry their market (spot);
- with ReplaceUnhealthy suspended, an instance that is terminated from outside stays a member, unhealthy, and nothing
  replaces it (moto always does).

Requests and answers pass botocore's model of the service in both directions, so shapes are those of AWS; what AWS does
with them is modelled here and by moto. No claim is made for what only AWS can show: how long things take, how Standby
members end, for how long tokens are remembered.

`POST /_tests` with JSON `{"do": ..., "value": ...}` takes orders of a test: see `_ORDERS`.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.autoscaling.exceptions import AutoscalingClientError
from moto.autoscaling.models import (
    AutoScalingBackend,
    FakeAutoScalingGroup,
    InstanceState,
    autoscaling_backends,
)
from moto.autoscaling.responses import AutoScalingResponse
from moto.core.responses import ActionResult
from moto.ec2.models import ec2_backends
from moto.ec2.models.instances import Instance, InstanceBackend
from moto.ec2.models.launch_templates import LaunchTemplateBackend
from moto.ec2.responses.launch_templates import LaunchTemplates
from moto.ec2.utils import parse_user_data
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.servicequotas.exceptions import NoSuchResource
from moto.servicequotas.responses import ServiceQuotasResponse
from werkzeug.serving import WSGIRequestHandler, run_simple
from werkzeug.wrappers import Request, Response

ACCOUNT = "123456789012"

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class _World:
    """What the orders of the tests have set."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.faults: list[dict[str, Any]] = []
        self.lagging = False
        self.unseen: set[str] = set()  # instances that lists do not have yet
        self.quotas: dict[str, float] = {}  # of EC2, by code; moto knows none
        self.launches: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}
        self.actions: list[str] = []  # all that was asked, in order
        self.launched: list[float] = []  # LaunchInstances by time.monotonic, one for the host

    def launch_fault(self, zone: str, market: str) -> dict[str, Any] | None:
        for fault in self.faults:
            if fault.get("zone") in (None, zone) and fault.get("market") in (None, market):
                return fault
        return None


WORLD = _World()


# -- LaunchInstances -----------------------------------------------------------------------------------------------


def launch_instances(response: AutoScalingResponse) -> ActionResult:
    parameters = response._get_params()
    name, token = parameters["AutoScalingGroupName"], parameters["ClientToken"]
    group = response.autoscaling_backend.autoscaling_groups.get(name)
    if group is None:
        raise _invalid(f"AutoScalingGroup name not found - AutoScalingGroup '{name}' not found")
    known = WORLD.launches.get((name, token))
    if known is not None:
        if known[0] != parameters:
            raise AutoscalingClientError(
                "IdempotentParameterMismatch", "The token was used with other parameters"
            )
        return ActionResult(known[1])
    zone, market = _zone(group, parameters), _market(group)
    count = int(parameters["RequestedCapacity"])
    if count > 100:
        raise _invalid("At most 100 instances can be launched at once")
    if (group.desired_capacity or 0) + count > (group.max_size or 0):
        raise _invalid("The launch would exceed the maximum size of the group")
    answer: dict[str, Any] = {"AutoScalingGroupName": name, "ClientToken": token}
    described = {"InstanceType": _type(group), "MarketType": market, "AvailabilityZone": zone}
    answer |= {"Instances": [], "Errors": []}
    fault = WORLD.launch_fault(zone, "spot" if market == "Spot" else "on-demand")
    if fault is not None:
        error = {"ErrorCode": fault["code"], "ErrorMessage": fault["message"]}
        answer["Errors"] = [{**described, **error}]
        count = fault.get("room", 0)  # how many come all the same
    if count:
        ids = _launch(group, zone, market, count)
        answer["Instances"] = [{**described, "InstanceIds": ids}]
        WORLD.launches[name, token] = (parameters, answer)
    return ActionResult(answer)


def _invalid(message: str) -> AutoscalingClientError:
    return AutoscalingClientError("ValidationError", message)


def _zone(group: FakeAutoScalingGroup, parameters: dict[str, Any]) -> str:
    zones = list(dict.fromkeys(group.availability_zones))
    wanted = parameters.get("AvailabilityZones") or (zones if len(zones) == 1 else [])
    if len(wanted) != 1:
        raise _invalid("An Availability Zone must be specified for groups with several")
    if wanted[0] not in zones:
        raise _invalid(f"The group is not in {wanted[0]}")
    return wanted[0]


def _market(group: FakeAutoScalingGroup) -> str:
    policy: dict[str, Any] = group.mixed_instances_policy or {}
    distribution = policy.get("InstancesDistribution", {})
    base = int(distribution.get("OnDemandBaseCapacity", 0))
    share = int(distribution.get("OnDemandPercentageAboveBaseCapacity", 100))
    if share not in (0, 100) or (share == 0 and base):
        raise _invalid("Groups that mix On-Demand and Spot are not supported")
    return "OnDemand" if share == 100 else "Spot"


def _type(group: FakeAutoScalingGroup) -> str:
    policy: dict[str, Any] = group.mixed_instances_policy or {}
    overrides = policy.get("LaunchTemplate", {}).get("Overrides") or [{}]
    return overrides[0].get("InstanceType") or group.instance_type


def _launch(group: FakeAutoScalingGroup, zone: str, market: str, count: int) -> list[str]:
    subnets = (group.vpc_zone_identifier or "").split(",")
    subnet = next(
        one.id
        for one in group.ec2_backend.describe_subnets(subnet_ids=subnets)
        if one.availability_zone == zone
    )
    reservation = group.ec2_backend.run_instances(
        group.image_id,
        count,
        group.user_data,
        [],
        instance_type=_type(group),
        tags={
            "instance": {
                **group.get_propagated_tags(),
                **group.instance_tags,
                "aws:autoscaling:groupName": group.name,
            }
        },
        placement=zone,
        is_instance_type_default=False,
        subnet_id=subnet,
        lifecycle="spot" if market == "Spot" else None,
        region_name=group.region,
    )
    for instance in reservation.instances:
        instance._state.name, instance._state.code = "pending", 0
        setattr(instance, "autoscaling_group", group)  # noqa: B010  moto keeps it there too
        protected = group.new_instances_protected_from_scale_in
        group.instance_states.append(InstanceState(instance, protected_from_scale_in=protected))
        if WORLD.lagging:
            WORLD.unseen.add(instance.id)
    group.desired_capacity = (group.desired_capacity or 0) + count
    return [instance.id for instance in reservation.instances]


def get_service_quota(response: ServiceQuotasResponse) -> str:
    code = json.loads(response.body)["QuotaCode"]
    if code not in WORLD.quotas:
        raise NoSuchResource
    return json.dumps({"Quota": {"QuotaCode": code, "Value": WORLD.quotas[code]}})


def get_default_quota(response: ServiceQuotasResponse) -> str:
    raise NoSuchResource


# -- corrections ---------------------------------------------------------------------------------------------------

_moto_reservations = InstanceBackend.all_reservations
_moto_create_version = LaunchTemplates.create_launch_template_version
_moto_terminated = AutoScalingBackend.notify_terminate_instances
_moto_describe_versions = LaunchTemplateBackend.describe_launch_template_versions
_moto_exit_standby = AutoScalingBackend.exit_standby_instances


def _all_reservations(backend: Any, filters: Any = None) -> list[Any]:
    found = _moto_reservations(backend, filters)
    for reservation in found:
        reservation.instances = [one for one in reservation.instances if one.id not in WORLD.unseen]
    return found


def _create_version(response: LaunchTemplates) -> ActionResult:
    data = response._get_param("LaunchTemplateData", {})
    if isinstance(data.get("UserData"), str):
        data["UserData"] = parse_user_data(data["UserData"])
    return _moto_create_version(response)


def delete_launch_template_versions(response: LaunchTemplates) -> ActionResult:
    """The numbers of those that stay do not change, so a deleted version leaves a hole."""
    template = response.ec2_backend.get_launch_template_by_name(
        response._get_param("LaunchTemplateName")
    )
    answer: dict[str, list[dict[str, Any]]] = {
        "SuccessfullyDeletedLaunchTemplateVersions": [],
        "UnsuccessfullyDeletedLaunchTemplateVersions": [],
    }
    deleted = template.__dict__.setdefault("deleted", set())
    for number in response._get_param("Versions", []):
        there = 1 < int(number) <= len(template.versions) and int(number) not in deleted
        deleted.add(int(number))
        outcome = "Successfully" if there else "Unsuccessfully"
        answer[f"{outcome}DeletedLaunchTemplateVersions"].append(
            {"LaunchTemplateName": template.name, "VersionNumber": int(number)}
        )
    return ActionResult(answer)


def _describe_versions(backend: Any, *arguments: Any, **more: Any) -> list[Any]:
    return [
        (template, version)
        for template, version in _moto_describe_versions(backend, *arguments, **more)
        if version.number not in template.__dict__.get("deleted", ())
    ]


def _terminated(backend: AutoScalingBackend, instance_ids: list[str]) -> None:
    still = {}
    for name, group in list(backend.autoscaling_groups.items()):
        if "ReplaceUnhealthy" in group._suspended_processes:
            still[name] = backend.autoscaling_groups.pop(name)
            for member in group.instance_states:
                if member.instance.id in instance_ids:
                    member.health_status = "Unhealthy"
    _moto_terminated(backend, instance_ids)
    backend.autoscaling_groups.update(still)


def _exit_standby(backend: AutoScalingBackend, group_name: str, instance_ids: list[str]) -> Any:
    """AWS takes only members that are on standby."""
    group = backend.autoscaling_groups[group_name]
    states = {one.instance.id: one.lifecycle_state for one in group.instance_states}
    if any(states.get(one) != "Standby" for one in instance_ids):
        raise _invalid("The instance is not in Standby")
    return _moto_exit_standby(backend, group_name, instance_ids)


def correct_moto() -> None:
    for owner, name, corrected in (
        (AutoScalingResponse, "launch_instances", launch_instances),
        (ServiceQuotasResponse, "get_service_quota", get_service_quota),
        (ServiceQuotasResponse, "get_aws_default_service_quota", get_default_quota),
        (LaunchTemplates, "delete_launch_template_versions", delete_launch_template_versions),
        (LaunchTemplates, "create_launch_template_version", _create_version),
        (AutoScalingBackend, "notify_terminate_instances", _terminated),
        (AutoScalingBackend, "exit_standby_instances", _exit_standby),
        (LaunchTemplateBackend, "describe_launch_template_versions", _describe_versions),
        (InstanceBackend, "all_reservations", _all_reservations),
    ):
        setattr(owner, name, corrected)


# -- orders of the tests -------------------------------------------------------------------------------------------


def _instances() -> Iterator[Instance]:
    for backend in ec2_backends[ACCOUNT].values():
        for reservation in _moto_reservations(backend):
            yield from reservation.instances


def _wipe() -> None:
    """All that drivers make. Networks stay: to make those of a region anew takes moto a third of a second."""
    for ec2 in [one for account in ec2_backends.values() for one in account.values()]:
        ec2.reservations.clear()
        ec2.launch_templates.clear()
        ec2.launch_template_name_to_ids.clear()
        ec2.launch_template_insert_order.clear()
    for scaling in [one for account in autoscaling_backends.values() for one in account.values()]:
        scaling.reset()
    WORLD.clear()


def _settle() -> None:
    WORLD.unseen.clear()
    for instance in _instances():
        if instance._state.name == "pending":
            instance._state.name, instance._state.code = "running", 16


def _members() -> list[dict[str, Any]]:
    return [
        {
            "group": group.name,
            "id": member.instance.id,
            "lifecycle": member.lifecycle_state,
            "protected": member.protected_from_scale_in,
            "desired": group.desired_capacity,
        }
        for group in _groups()
        for member in group.instance_states
    ]


def _set(name: str) -> Callable[[Any], None]:
    return lambda value: setattr(WORLD, name, value)


_ORDERS: dict[str, Callable[..., Any]] = {
    "wipe": _wipe,
    "settle": _settle,
    "members": _members,
    "actions": lambda: WORLD.actions,
    "launched": lambda: WORLD.launched,
    "lag": _set("lagging"),
    "faults": _set("faults"),
    "quotas": _set("quotas"),
}


def _groups() -> Iterator[FakeAutoScalingGroup]:
    for backend in autoscaling_backends[ACCOUNT].values():
        yield from backend.autoscaling_groups.values()


def _carry_out(do: str, value: Any = None) -> Any:
    return _ORDERS[do]() if value is None else _ORDERS[do](value)


def _refused(request: Request, fault: dict[str, Any]) -> Response:
    """As the service writes its errors: EC2's XML is of its own kind."""
    error = f"<Error><Code>{fault['code']}</Code><Message>{fault['message']}</Message></Error>"
    ec2 = "Version=2016-11-15" in request.get_data(as_text=True)
    body = (
        f"<Response><Errors>{error}</Errors><RequestID>1</RequestID></Response>"
        if ec2
        else f"<ErrorResponse>{error}<RequestId>1</RequestId></ErrorResponse>"
    )
    return Response(body, status=fault["status"], content_type="text/xml")


def application() -> Wsgi:
    correct_moto()
    moto = DomainDispatcherApplication(create_backend_app)

    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        if request.path == "/_tests":
            answer = Response(json.dumps(_carry_out(**json.loads(request.get_data()))))
            return answer(environ, start_response)
        body = request.get_data()  # cached, and put back for moto
        environ["wsgi.input"] = _again(body)
        action = _action(request, body.decode())
        WORLD.actions.append(action)
        if action == "LaunchInstances":
            WORLD.launched.append(time.monotonic())
        for fault in WORLD.faults:
            if fault.get("status"):
                return _refused(request, fault)(environ, start_response)
        return moto(environ, start_response)

    return serve


def _action(request: Request, body: str) -> str:
    """Of the services that are asked by forms, and of those that are asked by JSON."""
    target = request.headers.get("X-Amz-Target", "")
    forms = (one[7:] for one in body.split("&") if one[:7] == "Action=")
    return target.rpartition(".")[2] or next(forms, "")


def _again(body: bytes) -> Any:
    return io.BytesIO(body)


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_args: Any, **_more: Any) -> None:
        """Thousands of lines that nobody reads."""


# -- for the tests' side -------------------------------------------------------------------------------------------


class Moto:
    """A server of one's own; `order` as above."""

    def __init__(self, url: str) -> None:
        import httpx

        self.url = url
        self._http = httpx.Client(base_url=url, trust_env=False)

    def order(self, do: str, value: Any = None) -> Any:
        answer = self._http.post("/_tests", json={"do": do, "value": value})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def close(self) -> None:
        self._http.close()


@contextmanager
def serving() -> Iterator[Moto]:
    from tests.support.ports import free_port
    from tests.support.servers.process import ROOT, ServerProcess

    port = free_port()
    with ServerProcess("aws") as server:
        server.run(
            [sys.executable, "-m", "tests.support.clouds.moto", str(port)],
            environment={"PYTHONPATH": str(ROOT), "MOTO_PORT": str(port)},
        )
        server.wait(f"http://127.0.0.1:{port}/moto-api/")
        moto = Moto(f"http://127.0.0.1:{port}")
        try:
            yield moto
        finally:
            moto.close()


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), application(), threaded=True, request_handler=_Quiet)
