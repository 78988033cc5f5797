"""Amazon EC2: an Auto Scaling group and a launch template for each worker group, made and kept up to date here.

A launch writes a version of the template (its user data and tags are those of this launch alone), pins the Auto Scaling
group to it and calls LaunchInstances, which answers at once with ids or with why not, in the zone that the planner
chose, and is idempotent by the launch's token. What an Auto Scaling group does by itself, replacing, rebalancing,
scaling in, is switched off or protected against: the planner decides. Spot machines are in a twin group (E-46), as
LaunchInstances takes no group that mixes the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.clouds import aws_requests as requests
from valohai_dagster.capacity.clouds.aws_access import AwsAccess
from valohai_dagster.capacity.clouds.aws_errors import cloud_error, of_exception
from valohai_dagster.capacity.clouds.aws_groups import AwsGroups
from valohai_dagster.capacity.clouds.aws_places import AwsPlaces
from valohai_dagster.capacity.clouds.aws_quotas import problems_of_quotas
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble, identity_tags
from valohai_dagster.capacity.model import Machine, MachineState, Purchase
from valohai_dagster.settings_groups import AwsGroupSettings

_STATES = {
    "pending": MachineState.starting,
    "running": MachineState.running,
    "stopping": MachineState.stopping,
    "stopped": MachineState.stopped,
    "shutting-down": MachineState.terminating,
    "terminated": MachineState.gone,
}
_GOING = (MachineState.terminating, MachineState.gone)
_UNKNOWN_INSTANCE = ("InvalidInstanceID.NotFound", "InvalidInstanceID.Malformed")


class AwsDriver:
    """Machines are EC2 instances, named by their instance ids."""

    kind = "aws"

    def __init__(
        self,
        group: str,
        settings: AwsGroupSettings,
        *,
        deployment: str,
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self._group, self._settings, self._deployment, self._clock = (
            group,
            settings,
            deployment,
            clock,
        )
        self.can_stop = not settings.spot  # EC2 stops no spot machine that was asked for once
        self._access = AwsAccess(group, settings)
        self._places = AwsPlaces(group, settings, self._access)
        self._groups = AwsGroups(group, settings, deployment, self._access, self._places)

    def close(self) -> None:
        self._access.close()

    # -- looking ------------------------------------------------------------------------------------------------

    def check(self) -> Sequence[str]:
        """Credentials first: with bad ones the rest says only the same again."""
        try:
            with self._explained("tell whose credentials these are"):
                self._access.client("sts").get_caller_identity()
        except CloudError as error:
            return [str(error)]
        found: list[str] = []
        places = self._places
        places.forget()
        for doing, look in (
            ("look up the image", places.problems_of_image),
            ("look up the instance types", places.problems_of_types),
            ("look up the network", places.problems_of_zones),
            ("look up the security groups", places.problems_of_security),
            ("look up the Auto Scaling group", self._groups.problems),
            (
                "look up the quotas",
                lambda: problems_of_quotas(self._settings, self._access),
            ),
        ):
            try:
                with self._explained(doing):
                    found += look()
            except CloudError as error:
                found.append(str(error))
        return found

    def list(self) -> Sequence[Machine]:
        """Terminated ones for as long as EC2 tells them, about an hour: that they are gone for sure is worth knowing."""
        with self._explained("list machines"):
            instances = self._instances()
            self._groups.tidy({one["InstanceId"]: one["State"]["Name"] for one in instances})
        return [_machine(one) for one in instances]

    def _instances(self, **filters: str) -> list[dict[str, Any]]:
        """Of this group, further narrowed down by filters of EC2."""
        wanted = {
            "tag:valohai-deployment": self._deployment,
            "tag:valohai-group": self._group,
            **filters,
        }
        pages = (
            self._access.client("ec2")
            .get_paginator("describe_instances")
            .paginate(Filters=[{"Name": key, "Values": [one]} for key, one in wanted.items()])
        )
        return [
            instance
            for page in pages
            for reservation in page["Reservations"]
            for instance in reservation["Instances"]
        ]

    # -- launching ----------------------------------------------------------------------------------------------

    def launch(self, launch: Launch) -> Sequence[str]:
        zone, purchase = launch.zone or None, launch.purchase
        try:
            with self._explained("launch machines", zone=zone, purchase=purchase):
                known = self._instances(**{f"tag:{requests.LAUNCH_TAG}": launch.token})
                if len(known) >= launch.count:
                    return _ids(known)
                zones = self._places.zones(launch.zone, token=launch.token)
                if known:  # the rest is from there too, by the same calls
                    zones = [_machine(known[0]).zone]
                name = self._groups.prepare(launch, tags=self._tags(launch))
                made = self._launch_in(name, zones, launch)
                self._groups.delete_old_versions(name)
                return made
        except CloudError as error:
            if error.trouble is Trouble.invalid:
                self._places.forget()  # images and subnets are replaced, and then the old ones are unknown
            raise

    def _tags(self, launch: Launch) -> dict[str, str]:
        return {
            **requests.resource_tags(self._deployment, self._group, self._settings),
            **identity_tags(self._deployment, self._group, launch),
        }

    def _launch_in(self, name: str, zones: Sequence[str], launch: Launch) -> Sequence[str]:
        """In the first of the zones that has capacity. A machine that was made is found by its tag when the launch is
        repeated, and each attempt is idempotent for itself."""
        refused: list[CloudError] = []
        for zone in zones:
            made, error = self._ask(name, zone, launch)
            if error is None:
                return made
            error.made = made
            if made or error.trouble is not Trouble.capacity:
                raise error
            refused.append(error)
        raise refused[0] if launch.zone else self._nowhere(zones, refused, launch)

    def _ask(self, name: str, zone: str, launch: Launch) -> tuple[list[str], CloudError | None]:
        """Ids of what was made, and what stood in the way of more."""
        made: list[str] = []
        for start in range(0, launch.count, requests.MOST_AT_ONCE):
            wanted = min(requests.MOST_AT_ONCE, launch.count - start)
            try:
                answer = self._access.client("autoscaling").launch_instances(
                    AutoScalingGroupName=name,
                    RequestedCapacity=wanted,
                    ClientToken=requests.client_token(launch.token, zone, start),
                    AvailabilityZones=[zone],
                    RetryStrategy="none",
                )
            except (BotoCoreError, ClientError) as error:
                if not made:
                    raise
                doing, place = "launch more machines", {"zone": zone, "purchase": launch.purchase}
                return made, of_exception(error, self._group, doing, **place)
            new = [one for some in answer.get("Instances", ()) for one in some["InstanceIds"]]
            made += new
            if len(new) < wanted:  # errors of one instance type are none when another one has come
                error = next(iter(answer.get("Errors", ())), {})
                return made, self._refusal(error, zone, launch)
        return made, None

    def _refusal(self, error: Mapping[str, Any], zone: str, launch: Launch) -> CloudError:
        return cloud_error(
            self._group,
            f"launch {error.get('InstanceType') or self._settings.instance_type}",
            code=error.get("ErrorCode") or "InsufficientInstanceCapacity",
            text=error.get("ErrorMessage") or "",
            zone=zone,
            purchase=launch.purchase,
        )

    def _nowhere(
        self, zones: Sequence[str], refused: Sequence[CloudError], launch: Launch
    ) -> CloudError:
        """No zone was asked for, so that none is to be held."""
        return CloudError(
            f"no capacity in any of the zones {', '.join(zones)}; the last answer: {refused[-1]}",
            code=refused[-1].code,
            trouble=Trouble.capacity,
            purchase=launch.purchase,
        )

    # -- one machine --------------------------------------------------------------------------------------------

    def terminate(self, machine_id: str) -> None:
        with self._explained(f"terminate {machine_id}"):
            instance = self._find(machine_id)
            if instance is not None and _machine(instance).state not in _GOING:
                self._groups.terminate(machine_id)

    def stop(self, machine_id: str) -> None:
        """Its place in the Auto Scaling group waits for it, on standby."""
        with self._explained(f"stop {machine_id}"):
            instance = self._must_find(machine_id)
            if _machine(instance).state in (MachineState.starting, MachineState.running):
                self._groups.set_aside(machine_id)
                self._access.client("ec2").stop_instances(InstanceIds=[machine_id])

    def start(self, machine_id: str) -> None:
        """`list` takes it back into service when it runs."""
        with self._explained(f"start {machine_id}"):
            instance = self._must_find(machine_id)
            if _machine(instance).state in (MachineState.stopping, MachineState.stopped):
                self._access.client("ec2").start_instances(InstanceIds=[machine_id])

    def protect(self, machine_id: str, *, on: bool) -> None:
        """Machines are protected from the beginning; one on standby is out of reach of scaling anyway."""
        with self._explained(f"protect {machine_id}"):
            if self._find(machine_id) is not None:
                self._groups.protect(machine_id, on=on)

    def _find(self, machine_id: str) -> dict[str, Any] | None:
        """None when EC2 does not know it any more. Raises CloudError for a machine of somebody else."""
        try:
            answer = self._access.client("ec2").describe_instances(InstanceIds=[machine_id])
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in _UNKNOWN_INSTANCE:
                return None
            raise
        found = [one for some in answer["Reservations"] for one in some["Instances"]]
        if not found:
            return None
        tags = requests.tags_of(found[0])
        ours = identity_tags(self._deployment, self._group, Launch(token=""))
        if any(tags.get(key) != ours[key] for key in ("valohai-deployment", "valohai-group")):
            raise cloud_error(
                self._group,
                f"touch {machine_id}",
                code="NotOurs",
                text="its tags say that it is not a machine of this group",
            )
        return found[0]

    def _must_find(self, machine_id: str) -> dict[str, Any]:
        found = self._find(machine_id)
        if found is None or _machine(found).state in _GOING:
            raise cloud_error(
                self._group, f"touch {machine_id}", code="NotFound", text="it is gone"
            )
        return found

    @contextmanager
    def _explained(
        self, doing: str, *, zone: str | None = None, purchase: Purchase | None = None
    ) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError) as error:
            found = of_exception(error, self._group, doing, zone=zone, purchase=purchase)
            if found.trouble is Trouble.credentials:
                self._access.close()
            raise found from error


def _ids(instances: Sequence[Mapping[str, Any]]) -> list[str]:
    return [one["InstanceId"] for one in instances if _machine(one).state not in _GOING]


def _machine(instance: Mapping[str, Any]) -> Machine:
    tags = requests.tags_of(instance)
    spot = instance.get("InstanceLifecycle") == "spot"
    return Machine(
        id=instance["InstanceId"],
        zone=instance.get("Placement", {}).get("AvailabilityZone", ""),
        purchase=Purchase.spot if spot else Purchase.on_demand,
        state=_STATES.get(instance["State"]["Name"], MachineState.running),
        created_at=_created_at(instance),
        token=tags.get(requests.LAUNCH_TAG),
        bootstrap=tags.get(requests.BOOTSTRAP_TAG),
    )


def _created_at(instance: Mapping[str, Any]) -> datetime:
    """LaunchTime is that of the last start; disks and addresses know when they were attached first."""
    times = [instance["LaunchTime"]]
    times += [
        disk["Ebs"]["AttachTime"]
        for disk in instance.get("BlockDeviceMappings", ())
        if disk.get("Ebs", {}).get("AttachTime")
    ]
    times += [
        card["Attachment"]["AttachTime"]
        for card in instance.get("NetworkInterfaces", ())
        if card.get("Attachment", {}).get("AttachTime")
    ]
    return min(times)
