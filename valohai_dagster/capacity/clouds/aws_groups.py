"""The Auto Scaling groups of one worker group and their launch templates: made when they are first needed, changed
with every launch, made again when somebody deleted them (E-46)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from valohai_dagster.capacity.clouds import aws_requests as requests
from valohai_dagster.capacity.clouds.aws_access import AwsAccess
from valohai_dagster.capacity.clouds.aws_errors import cloud_error
from valohai_dagster.capacity.clouds.aws_places import AwsPlaces
from valohai_dagster.capacity.clouds.base import Launch
from valohai_dagster.capacity.model import Purchase
from valohai_dagster.settings_groups import AwsGroupSettings

log = logging.getLogger(__name__)

KEPT_VERSIONS = 5  # of a launch template; others are deleted, as AWS keeps at most 10,000
DELETED_AT_ONCE = 50  # further back, for those that a process could not delete before it died
_NO_TEMPLATE = "InvalidLaunchTemplateName.NotFoundException"
_NOT_OURS = "it has no tag valohai-deployment of ours; delete or rename it"
_DEAD = ("shutting-down", "terminated")
_STANDBY = ("Standby", "EnteringStandby")
_LEAVING = ("Terminating", "Terminated", "Detaching", "Detached")


class AwsGroups:
    """Raises CloudError and what botocore raises."""

    def __init__(
        self,
        group: str,
        settings: AwsGroupSettings,
        deployment: str,
        access: AwsAccess,
        places: AwsPlaces,
    ) -> None:
        self._group, self._settings, self._deployment = group, settings, deployment
        self._access, self._places = access, places
        self._tags = requests.resource_tags(deployment, group, settings)
        self._names = {
            purchase: requests.resource_name(deployment, group, purchase) for purchase in Purchase
        }

    @property
    def _scaling(self) -> Any:
        return self._access.client("autoscaling")

    # -- before a launch ----------------------------------------------------------------------------------------

    def prepare(self, launch: Launch, *, tags: Mapping[str, str]) -> str:
        """The name of the Auto Scaling group, ready to launch just this."""
        name = self._names[launch.purchase]
        version = self._write_version(name, launch, tags)
        described = self._described(launch.purchase)
        found = described[0] if described else None
        if found is not None and not self._is_ours(found):
            raise cloud_error(
                self._group, f"use the Auto Scaling group {name}", code="NotOurs", text=_NOT_OURS
            )
        there = found["DesiredCapacity"] if found is not None else 0
        settings = requests.scaling_group(
            name,
            policy=requests.mixed_instances(
                self._settings,
                template=name,
                version=version,
                purchase=launch.purchase,
                capped=found is not None and _is_capped(found),
            ),
            subnets=[one for some in self._places.subnets.values() for one in some],
            # Never the limit itself: that is the planner's, and a smaller one would begin to terminate.
            most=max(self._settings.max_machines, there + launch.count),
        )
        if found is None:
            self._make(name, settings)
        else:
            self._scaling.update_auto_scaling_group(**settings)
            self._keep_still(found)
        return name

    def _write_version(self, name: str, launch: Launch, tags: Mapping[str, str]) -> int:
        data = requests.template_data(
            self._settings,
            image=self._places.image.id,
            root_device=self._places.image.root_device,
            name=name,
            tags=tags,
            user_data=launch.user_data,
        )
        ec2 = self._access.client("ec2")
        wanted = {
            "LaunchTemplateName": name,
            "VersionDescription": launch.token,
            "LaunchTemplateData": data,
        }
        try:
            made = ec2.create_launch_template_version(**wanted)["LaunchTemplateVersion"]
            return made["VersionNumber"]
        except ClientError as error:
            if _code(error) != _NO_TEMPLATE:
                raise
        ec2.create_launch_template(
            **wanted,
            TagSpecifications=[
                {"ResourceType": "launch-template", "Tags": requests.tag_list(self._tags)}
            ],
        )
        return 1

    def _make(self, name: str, settings: Mapping[str, Any]) -> None:
        self._scaling.create_auto_scaling_group(
            **settings, DesiredCapacity=0, Tags=requests.group_tags(name, self._tags)
        )
        self._scaling.suspend_processes(
            AutoScalingGroupName=name, ScalingProcesses=requests.SUSPENDED
        )
        log.info(
            "group %s: the Auto Scaling group %s is made",
            self._group,
            name,
            extra={"action": "aws_group", "group": self._group, "auto_scaling_group": name},
        )

    def _keep_still(self, found: Mapping[str, Any]) -> None:
        """Puts right what is otherwise than we made it: processes, tags."""
        name = found["AutoScalingGroupName"]
        suspended = {one["ProcessName"] for one in found.get("SuspendedProcesses", ())}
        if not suspended >= set(requests.SUSPENDED):
            self._scaling.suspend_processes(
                AutoScalingGroupName=name, ScalingProcesses=requests.SUSPENDED
            )
        if not self._tags.items() <= requests.tags_of(found).items():
            self._scaling.create_or_update_tags(Tags=requests.group_tags(name, self._tags))

    # -- after one ----------------------------------------------------------------------------------------------

    def delete_old_versions(self, name: str) -> None:
        """User data of past launches is of no use to anybody. Version 1 is the default, which cannot be deleted."""
        self._try("delete old versions of the launch template", lambda: self._delete_old(name))

    def _delete_old(self, name: str) -> None:
        ec2 = self._access.client("ec2")
        found = ec2.describe_launch_templates(LaunchTemplateNames=[name])["LaunchTemplates"][0]
        last = found["LatestVersionNumber"] - KEPT_VERSIONS
        old = range(max(2, last - DELETED_AT_ONCE + 1), last + 1)
        if old:
            ec2.delete_launch_template_versions(
                LaunchTemplateName=name, Versions=[str(one) for one in old]
            )

    # -- looking ------------------------------------------------------------------------------------------------

    def problems(self) -> Iterator[str]:
        """Somebody else has a group of our name; or Auto Scaling may not be asked, which is an error."""
        for found in self._described(*Purchase):
            if not self._is_ours(found):
                yield f"somebody else made the Auto Scaling group {found['AutoScalingGroupName']}: {_NOT_OURS}"

    def _described(self, *purchases: Purchase) -> list[dict[str, Any]]:
        names = [self._names[one] for one in purchases]
        return self._scaling.describe_auto_scaling_groups(AutoScalingGroupNames=names)[
            "AutoScalingGroups"
        ]

    def _is_ours(self, found: Mapping[str, Any]) -> bool:
        return requests.tags_of(found).get("valohai-deployment") == self._deployment

    def tidy(self, states: Mapping[str, str]) -> None:
        """Members that EC2 has terminated are taken out, as nothing may replace them; those that were started again are
        taken back into service. `states`: of instances, by id, as EC2 lists them. A member that EC2 does not list is
        only taken for dead if Auto Scaling says so too: lists are late."""
        for found in self._described(*Purchase):
            for member in found["Instances"]:
                state = states.get(member["InstanceId"])
                unhealthy = member.get("HealthStatus", "").lower() == "unhealthy"
                if member["LifecycleState"].startswith(_LEAVING):
                    continue
                if state in _DEAD or (state is None and unhealthy):
                    self._try("remove a member", lambda member=member: self._end(member))
                elif member["LifecycleState"] == "Standby" and state == "running":
                    self._try(
                        "take back a member",
                        lambda found=found, member=member: self._scaling.exit_standby(
                            AutoScalingGroupName=found["AutoScalingGroupName"],
                            InstanceIds=[member["InstanceId"]],
                        ),
                    )

    def _try(self, doing: str, call: Any) -> None:
        """What does not go now is tried with the next list."""
        try:
            call()
        except (BotoCoreError, ClientError) as error:
            log.warning(
                "group %s: cannot %s yet: %s",
                self._group,
                doing,
                type(error).__name__,
                extra={"action": "aws_tidy", "group": self._group},
            )

    # -- one machine --------------------------------------------------------------------------------------------

    def _member(self, machine_id: str) -> dict[str, Any] | None:
        """None when no Auto Scaling group of ours has it, or has it any longer."""
        found = self._scaling.describe_auto_scaling_instances(InstanceIds=[machine_id])
        for member in found["AutoScalingInstances"]:
            ours = member["AutoScalingGroupName"] in self._names.values()
            if ours and not member["LifecycleState"].startswith(_LEAVING):
                return member
        return None

    def terminate(self, machine_id: str) -> None:
        """Also one that is in no group of ours, after somebody detached it."""
        member = self._member(machine_id)
        if member is not None:
            try:
                self._end(member)
                return
            except ClientError as error:
                if (
                    _code(error) != "ValidationError"
                ):  # not in the group any more, or in no state for it
                    raise
        self._access.client("ec2").terminate_instances(InstanceIds=[machine_id])

    def _end(self, member: Mapping[str, Any]) -> None:
        """One on standby is not counted in the desired capacity any more."""
        self._scaling.terminate_instance_in_auto_scaling_group(
            InstanceId=member["InstanceId"],
            ShouldDecrementDesiredCapacity=member["LifecycleState"] not in _STANDBY,
        )

    def set_aside(self, machine_id: str) -> None:
        """Standby: the group neither counts nor replaces it while it is stopped."""
        member = self._member(machine_id)
        if member is not None and member["LifecycleState"] not in _STANDBY:
            self._scaling.enter_standby(
                AutoScalingGroupName=member["AutoScalingGroupName"],
                InstanceIds=[machine_id],
                ShouldDecrementDesiredCapacity=True,
            )

    def protect(self, machine_id: str, *, on: bool) -> None:
        member = self._member(machine_id)
        if member is not None and member["LifecycleState"] == "InService":
            self._scaling.set_instance_protection(
                AutoScalingGroupName=member["AutoScalingGroupName"],
                InstanceIds=[machine_id],
                ProtectedFromScaleIn=on,
            )


def _is_capped(found: Mapping[str, Any]) -> bool:
    policy = found.get("MixedInstancesPolicy", {})
    return bool(policy.get("InstancesDistribution", {}).get("SpotMaxPrice"))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
