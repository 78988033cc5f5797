"""What we ask of AWS for a group: names, the launch template, the Auto Scaling group. Pure (E-40 to E-46)."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from valohai_dagster.capacity.clouds.base import Launch, identity_tags
from valohai_dagster.capacity.model import Purchase
from valohai_dagster.settings_groups import AwsGroupSettings

NAME_CHARACTERS = 120  # of 128 that a launch template may have; `-spot` comes behind
COOLDOWN_SECONDS = 60
HOP_LIMIT = 2  # so that containers reach the instance's metadata service (E-46)
# What an Auto Scaling group would do by itself, and here the planner decides. `Launch` and `Terminate` stay: our own calls
# need them.
SUSPENDED = (
    "AZRebalance",
    "AlarmNotification",
    "InstanceRefresh",
    "ReplaceUnhealthy",
    "ScheduledActions",
)
MOST_AT_ONCE = 100  # machines in one LaunchInstances
LAUNCH_TAG = "valohai-launch"
BOOTSTRAP_TAG = "valohai-bootstrap"


def resource_name(deployment: str, group: str, purchase: Purchase = Purchase.on_demand) -> str:
    """Of the group's Auto Scaling group and launch template; spot machines are in a twin (E-46).

    >>> resource_name("d1", "gpu", Purchase.spot)
    'valohai-d1-gpu-spot'
    """
    wanted = f"valohai-{deployment}-{group}"
    name = re.sub(r"[^A-Za-z0-9().\-/_]", "-", wanted)
    if name != wanted or len(name) > NAME_CHARACTERS:
        name = f"{name[: NAME_CHARACTERS - 9]}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
    return f"{name}-spot" if purchase is Purchase.spot else name


def client_token(token: str, *parts: str | int) -> str:
    """What makes one call of a launch idempotent: AWS allows 64 characters, and not all.

    >>> client_token("a1b2", "eu-west-1a", 0)
    'a1b2-eu-west-1a-0'
    """
    wanted = "-".join((token, *map(str, parts)))
    if re.fullmatch(r"[A-Za-z0-9\-_/]{1,64}", wanted):
        return wanted
    return hashlib.sha256(wanted.encode()).hexdigest()


def resource_tags(deployment: str, group: str, settings: AwsGroupSettings) -> dict[str, str]:
    """On everything that we make: both spellings of E-41, and what the settings add."""
    ours = identity_tags(deployment, group, Launch(token=""))
    del ours[LAUNCH_TAG]
    return {**settings.tags, "Valohai": "1", "Role": "ValohaiWorker", **ours}


def tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def tags_of(described: Mapping[str, Any]) -> dict[str, str]:
    """Of an instance, a template or a group as AWS describes it."""
    return {tag["Key"]: tag["Value"] for tag in described.get("Tags") or ()}


def template_data(
    settings: AwsGroupSettings,
    *,
    image: str,
    root_device: str,
    name: str,
    tags: Mapping[str, str],
    user_data: str,
) -> dict[str, Any]:
    """One version of the launch template, for the machines of one launch: its tags and user data are theirs alone."""
    marks = tag_list({**tags, "Name": name})
    data: dict[str, Any] = {
        "ImageId": image,
        "InstanceType": settings.instance_type,
        "UserData": base64.b64encode(user_data.encode()).decode(),
        # An abandoned machine powers itself off; then it must not stay, stopped, and cost its disk.
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": HOP_LIMIT,
            "HttpEndpoint": "enabled",
        },
        "BlockDeviceMappings": [
            {
                "DeviceName": root_device,
                "Ebs": {
                    "VolumeSize": settings.disk_gb,
                    "VolumeType": "gp3",
                    "Encrypted": True,
                    "DeleteOnTermination": True,
                },
            }
        ],
        "NetworkInterfaces": [
            {
                "DeviceIndex": 0,
                "AssociatePublicIpAddress": settings.public_address,
                "DeleteOnTermination": True,
                **({"Groups": settings.security_groups} if settings.security_groups else {}),
            }
        ],
        "TagSpecifications": [
            {"ResourceType": resource, "Tags": marks} for resource in ("instance", "volume")
        ],
    }
    if settings.service_account:
        key = "Arn" if settings.service_account.startswith("arn:") else "Name"
        data["IamInstanceProfile"] = {key: settings.service_account}
    return data


def mixed_instances(
    settings: AwsGroupSettings, *, template: str, version: int, purchase: Purchase, capped: bool
) -> dict[str, Any]:
    """All spot or all on demand: LaunchInstances takes no mixture of the two. `capped`: the group has a highest price,
    which an empty one takes away."""
    spot = purchase is Purchase.spot
    price = str(settings.spot_max_price or "")
    types = dict.fromkeys((settings.instance_type, *settings.instance_types))
    return {
        "LaunchTemplate": {
            "LaunchTemplateSpecification": {
                "LaunchTemplateName": template,
                "Version": str(version),
            },
            "Overrides": [{"InstanceType": one} for one in types],
        },
        "InstancesDistribution": {
            "OnDemandBaseCapacity": 0,
            "OnDemandPercentageAboveBaseCapacity": 0 if spot else 100,
            "OnDemandAllocationStrategy": "prioritized",
            # `capacity-optimized-prioritized` looks at the order of the types; one type has none.
            "SpotAllocationStrategy": "capacity-optimized-prioritized"
            if len(types) > 1
            else "capacity-optimized",
            **({"SpotMaxPrice": price} if spot and (price or capped) else {}),
        },
    }


def scaling_group(
    name: str, *, policy: Mapping[str, Any], subnets: Sequence[str], most: int
) -> dict[str, Any]:
    """What both making and changing the Auto Scaling group take. The desired capacity is not ours to set: each launch
    adds to it and each termination takes away, so that nothing is ever launched or terminated by arithmetic."""
    return {
        "AutoScalingGroupName": name,
        "MixedInstancesPolicy": policy,
        "MinSize": 0,
        "MaxSize": most,
        "DefaultCooldown": COOLDOWN_SECONDS,
        "VPCZoneIdentifier": ",".join(subnets),
        "HealthCheckType": "EC2",
        "NewInstancesProtectedFromScaleIn": True,
        "CapacityRebalance": False,
    }


def group_tags(name: str, tags: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "ResourceId": name,
            "ResourceType": "auto-scaling-group",
            "PropagateAtLaunch": True,
            **tag,
        }
        for tag in tag_list(tags)
    ]
