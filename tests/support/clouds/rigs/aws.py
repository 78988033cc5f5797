"""AWS: the real client against moto, corrected where it differs (tests/support/clouds/moto.py says where)."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.support.clouds import moto
from tests.support.clouds.rig import DEPLOYMENT, GROUP, Rig
from valohai_dagster.capacity.clouds.aws import AwsDriver
from valohai_dagster.capacity.clouds.base import Driver, Trouble
from valohai_dagster.capacity.model import Purchase
from valohai_dagster.settings_groups import AwsGroupSettings

NEED: str | None = None
REGION = "eu-west-1"
IMAGE = "ami-785db401"  # one that moto knows

# What AWS says: code, HTTP status where the call itself is refused (else the launch is, with 200), words.
_REFUSALS: dict[Trouble, tuple[str, int, str]] = {
    Trouble.capacity: (
        "InsufficientInstanceCapacity",
        0,
        "We currently do not have sufficient t3.medium capacity in the zone you requested.",
    ),
    Trouble.quota: (
        "VcpuLimitExceeded",
        0,
        "You have requested more vCPU capacity than your current vCPU limit of 0 allows.",
    ),
    Trouble.throttled: ("RequestLimitExceeded", 503, "Request limit exceeded."),
    Trouble.credentials: (
        "AuthFailure",
        401,
        "AWS was not able to validate the provided access credentials",
    ),
    Trouble.invalid: ("InvalidAMIID.NotFound", 0, "The image id '[ami-0]' does not exist"),
    Trouble.outage: ("InternalError", 500, "An internal error has occurred"),
}


@dataclass(frozen=True, kw_only=True)
class Account:
    """The server, and clients of the test's own that look behind the driver's back."""

    server: moto.Moto
    ec2: Any
    scaling: Any


class AwsRig(Rig):
    kind = "aws"
    zones = ("eu-west-1a", "eu-west-1b")
    spot = True

    def __init__(self, account: Account, stack: ExitStack) -> None:
        self.server, self.ec2, self.scaling = account.server, account.ec2, account.scaling
        self._stack = stack

    def settings(self, **changes: Any) -> AwsGroupSettings:
        given = {
            "kind": "aws",
            "region": REGION,
            "instance_type": "t3.medium",
            "image": IMAGE,
            "endpoint_url": self.server.url,
            **changes,
        }
        return AwsGroupSettings(**given)

    def driver(self, *, group: str = GROUP, **changes: Any) -> Driver:
        driver = AwsDriver(group, self.settings(**changes), deployment=DEPLOYMENT)
        self._stack.callback(driver.close)
        return driver

    def foreign(self) -> str:
        made = self.ec2.run_instances(
            ImageId=IMAGE, InstanceType="t3.medium", MinCount=1, MaxCount=1
        )
        return made["Instances"][0]["InstanceId"]

    def described(self, machine_id: str) -> dict[str, Any]:
        answer = self.ec2.describe_instances(InstanceIds=[machine_id])
        return answer["Reservations"][0]["Instances"][0]

    def alive(self, machine_id: str) -> bool:
        going = ("shutting-down", "terminated")
        return self.described(machine_id)["State"]["Name"] not in going

    def tags(self, machine_id: str) -> Mapping[str, str]:
        return {one["Key"]: one["Value"] for one in self.described(machine_id)["Tags"]}

    def user_data(self, machine_id: str) -> str:
        answer = self.ec2.describe_instance_attribute(InstanceId=machine_id, Attribute="userData")
        return base64.b64decode(answer["UserData"]["Value"]).decode()

    def members(self) -> dict[str, dict[str, Any]]:
        """Of Auto Scaling groups, by instance id."""
        return {one["id"]: one for one in self.server.order("members")}

    def protected(self, machine_id: str) -> bool:
        return self.members()[machine_id]["protected"]

    def settle(self) -> None:
        self.server.order("settle")

    def vanish(self, machine_id: str) -> None:
        self.ec2.terminate_instances(InstanceIds=[machine_id])

    @contextmanager
    def refuse(
        self,
        trouble: Trouble,
        *,
        zone: str | None = None,
        purchase: Purchase | None = None,
        room: int = 0,
    ) -> Iterator[None]:
        code, status, message = _REFUSALS[trouble]
        fault = {
            "code": code,
            "status": status,
            "message": message,
            "zone": zone,
            "market": purchase.value if purchase else None,
            "room": room,
        }
        self.server.order("faults", [fault])
        try:
            yield
        finally:
            self.server.order("faults", [])

    @contextmanager
    def lag(self) -> Iterator[None]:
        self.server.order("lag", True)
        yield
        self.server.order("lag", False)

    def wrong_settings(self) -> Mapping[str, Mapping[str, Any]]:
        return {
            "ami-00000000": {"image": "ami-00000000"},
            "x9.huge": {"instance_type": "x9.huge"},
            "t9.tiny": {"instance_types": ["t9.tiny"]},
            "subnet-00000000": {"subnets": ["subnet-00000000"]},
            "vpc-00000000": {"network": "vpc-00000000"},
            "eu-west-1x": {"zones": ["eu-west-1x"]},
            "sg-00000000": {"security_groups": ["sg-00000000"]},
        }


@contextmanager
def serving() -> Iterator[Account]:
    with moto.serving() as server:
        session = boto3.Session("testing", "testing", region_name=REGION)
        ec2 = session.client("ec2", endpoint_url=server.url)
        scaling = session.client("autoscaling", endpoint_url=server.url)
        yield Account(server=server, ec2=ec2, scaling=scaling)
        ec2.close()
        scaling.close()


@contextmanager
def opened(server: Account, tmp_path: Path) -> Iterator[AwsRig]:
    """Credentials come from the environment, as they would for a service."""
    server.server.order("wipe")
    with pytest.MonkeyPatch.context() as environment, ExitStack() as stack:
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        environment.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
        environment.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield AwsRig(server, stack)
