"""What a worker group is made of on Google Compute Engine: names, template, group manager. Pure.

Each zone has one managed instance group for each way of paying. Machines are made in it one by one by name
(`createInstances`), so that each has its own metadata: user data, the launch's token and tags. Labels, which can be
filtered by but hold only a few characters, come from the template.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from valohai_dagster.capacity.clouds.base import Launch, identity_tags
from valohai_dagster.capacity.model import Machine, MachineState, Purchase
from valohai_dagster.settings_groups import GcpGroupSettings

NETWORK_TAG = "valohai-worker"  # E-60
LAUNCHED_AT, USER_DATA = "valohai-launched-at", "user-data"
UBUNTU = "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"

_ARM = ("t2a-", "c4a-", "n4a-", "a4x-")
_HYPERDISK_ONLY = ("n4-", "n4a-", "n4d-", "c4-", "c4a-", "c4d-", "x4-", "a4-", "a4x-", "h4d-")

_ACTIONS = {
    "CREATING": MachineState.starting,
    "CREATING_WITHOUT_RETRIES": MachineState.starting,
    "RECREATING": MachineState.starting,
    "STARTING": MachineState.starting,
    "RESUMING": MachineState.starting,
    "RESTARTING": MachineState.starting,
    "STOPPING": MachineState.stopping,
    "SUSPENDING": MachineState.stopping,
    "DELETING": MachineState.terminating,
    "ABANDONING": MachineState.terminating,
}
_STATUSES = {
    "PENDING": MachineState.starting,
    "PROVISIONING": MachineState.starting,
    "STAGING": MachineState.starting,
    "RUNNING": MachineState.running,
    "REPAIRING": MachineState.running,
    "PENDING_STOP": MachineState.stopping,
    "STOPPING": MachineState.stopping,
    "SUSPENDING": MachineState.stopping,
    "STOPPED": MachineState.stopped,
    "SUSPENDED": MachineState.stopped,
    "TERMINATED": MachineState.stopped,
    "DEPROVISIONING": MachineState.terminating,
}


def base_name(deployment: str, group: str) -> str:
    """Starts with `valohai`, as permissions may be restricted to such names (E-60)."""
    digest = hashlib.sha256(f"{deployment}\0{group}".encode()).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9]+", "-", group.lower()).strip("-")[:24].rstrip("-")
    return f"valohai-{readable or 'group'}-{digest}"


def manager_name(base: str, purchase: Purchase) -> str:
    return f"{base}-spot" if purchase is Purchase.spot else base


def purchase_of(base: str, manager: str) -> Purchase:
    return Purchase.spot if manager == manager_name(base, Purchase.spot) else Purchase.on_demand


def machine_names(base: str, launch: Launch) -> list[str]:
    """The same for the same launch, so that a repeated one finds what the first one made."""
    digest = hashlib.sha256(launch.token.encode()).hexdigest()[:12]
    return [f"{base}-{digest}-{number}" for number in range(launch.count)]


def last(url: str) -> str:
    """The name of what an address of the API stands for."""
    return url.rpartition("/")[2]


def region_of(settings: GcpGroupSettings) -> str:
    """Empty when neither the region nor a zone is set."""
    return settings.region or (settings.zones[0].rpartition("-")[0] if settings.zones else "")


def label(text: str) -> str:
    """As labels may be: lower case, digits, `_` and `-`, 63 characters."""
    return re.sub(r"[^a-z0-9_-]", "_", text.lower())[:63]


def labels(settings: GcpGroupSettings, deployment: str, group: str) -> dict[str, str]:
    ours = {"valohai": "1", "valohai-deployment": deployment, "valohai-group": group}
    return {label(key): label(value) for key, value in {**settings.tags, **ours}.items()}


def image_of(settings: GcpGroupSettings) -> str:
    """Its path; a bare name is one of the project's own images, `family/NAME` the newest of a family there."""
    image = settings.image
    if not image:
        arm = settings.instance_type.startswith(_ARM)
        return UBUNTU + ("arm64" if arm else "amd64")
    if image.startswith(("projects/", "https://")):
        return image
    return f"projects/{settings.project}/global/images/{image}"


def network_path(settings: GcpGroupSettings) -> str:
    name = settings.network or "default"
    return name if "/" in name else f"projects/{settings.project}/global/networks/{name}"


def subnet_path(settings: GcpGroupSettings) -> str | None:
    """Subnets span the zones of a region: the first one is used."""
    if not settings.subnets:
        return None
    name = settings.subnets[0]
    place = f"projects/{settings.project}/regions/{region_of(settings)}/subnetworks"
    return name if "/" in name else f"{place}/{name}"


def template_body(
    settings: GcpGroupSettings, *, deployment: str, group: str, purchase: Purchase
) -> dict[str, Any]:
    """Named after its content: another name is another template."""
    marks = labels(settings, deployment, group)
    hyperdisk = settings.instance_type.startswith(_HYPERDISK_ONLY)
    properties: dict[str, Any] = {
        "machine_type": settings.instance_type,
        "labels": marks,
        "tags": {"items": sorted({NETWORK_TAG, *settings.security_groups})},
        "disks": [
            {
                "boot": True,
                "auto_delete": True,
                "initialize_params": {
                    "source_image": image_of(settings),
                    "disk_size_gb": settings.disk_gb,
                    "disk_type": "hyperdisk-balanced" if hyperdisk else "pd-balanced",
                    "labels": marks,
                },
            }
        ],
        "network_interfaces": [_interface(settings)],
        "scheduling": _scheduling(settings, purchase),
    }
    if settings.service_account:
        properties["service_accounts"] = [{"email": settings.service_account, "scopes": [SCOPE]}]
    if settings.accelerator:
        properties["guest_accelerators"] = [
            {
                "accelerator_type": settings.accelerator,
                "accelerator_count": max(1, settings.gpus),
            }
        ]
    content = json.dumps(properties, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    return {"name": f"{base_name(deployment, group)}-{digest}", "properties": properties}


def _interface(settings: GcpGroupSettings) -> dict[str, Any]:
    subnet = subnet_path(settings)
    place = {"subnetwork": subnet} if subnet else {"network": network_path(settings)}
    address = [{"type_": "ONE_TO_ONE_NAT", "name": "External NAT"}]
    return {**place, "access_configs": address} if settings.public_address else place


def _scheduling(settings: GcpGroupSettings, purchase: Purchase) -> dict[str, Any]:
    """Nothing restarts by itself: the planner decides whether there is still work for it."""
    spot = purchase is Purchase.spot
    fixed = spot or settings.gpus > 0 or bool(settings.accelerator)  # cannot be moved while it runs
    options: dict[str, Any] = {
        "provisioning_model": "SPOT" if spot else "STANDARD",
        "automatic_restart": False,
        "on_host_maintenance": "TERMINATE" if fixed else "MIGRATE",
    }
    return {**options, "instance_termination_action": "DELETE"} if spot else options


def manager_body(base: str, purchase: Purchase, *, project: str, template: str) -> dict[str, Any]:
    """A group that makes, repairs, replaces and updates nothing of its own accord."""
    return {
        "name": manager_name(base, purchase),
        "base_instance_name": base,
        "description": "Workers of a Valohai group. Scaled by its control plane: add no autoscaler.",
        "instance_template": template_path(project, template),
        "target_size": 0,
        "update_policy": {
            "type_": "OPPORTUNISTIC",
            "minimal_action": "REPLACE",
            "replacement_method": "RECREATE",
            "max_surge": {"fixed": 0},
        },
        "instance_lifecycle_policy": {"default_action_on_failure": "DO_NOTHING"},
    }


def template_path(project: str, template: str) -> str:
    return f"projects/{project}/global/instanceTemplates/{template}"


def instance_path(zone: str, name: str) -> str:
    return f"zones/{zone}/instances/{name}"


def metadata_of(
    launch: Launch, *, deployment: str, group: str, launched_at: datetime
) -> dict[str, str]:
    """What tells one machine from the others of its template."""
    return {
        **identity_tags(deployment, group, launch),
        LAUNCHED_AT: launched_at.isoformat(),
        USER_DATA: launch.user_data,
    }


def ended(member: Any) -> bool:
    """Left by what ended without the group being told: reclaimed, deleted by hand, powered off by itself."""
    if member.current_action != "NONE":
        return False
    if not member.instance_status:
        return True
    off = _STATUSES.get(member.instance_status) is MachineState.stopped
    return off and member.target_status == "RUNNING"


def failed(member: Any) -> bool:
    """Could not be made, and would be tried again and again by the cloud."""
    creating = str(member.current_action).startswith("CREATING")
    return creating and not member.instance_status and bool(member.last_attempt.errors.errors)


def state_of(member: Any) -> MachineState:
    """One that is to start is stopped until it has found a place: the group would try for ever, and say nothing."""
    of_action = _ACTIONS.get(member.current_action)
    status = _STATUSES.get(member.instance_status, MachineState.starting)
    waits = of_action is MachineState.starting and status is MachineState.stopped
    return status if waits or of_action is None else of_action


def machine_of(
    member: Any,
    *,
    zone: str,
    purchase: Purchase,
    metadata: Mapping[str, str],
    created_at: datetime,
    state: MachineState,
) -> Machine:
    return Machine(
        id=last(member.instance),
        zone=zone,
        purchase=purchase,
        state=state,
        created_at=created_at,
        token=metadata.get("valohai-launch"),
        bootstrap=metadata.get("valohai-bootstrap"),
    )
