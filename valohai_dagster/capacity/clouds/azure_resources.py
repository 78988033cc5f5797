"""What a worker group is made of on Azure: names, scale set, machines. Pure; bodies in the words of its REST API.

The scale set is of the flexible kind and without a profile: a frame that machines are made into by name. So each has
its own tags and user data, in the zone and at the price that its launch asks for, and the scale set scales nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Any

from valohai_dagster.capacity.clouds.base import Launch, identity_tags
from valohai_dagster.capacity.model import Machine, MachineState, Purchase
from valohai_dagster.settings_groups import AzureGroupSettings

UBUNTU = "Canonical:ubuntu-24_04-lts:server"
ADMIN = "valohai"
NETWORK_API = "2022-11-01"

_ARM_SIZE = re.compile(r"Standard_[A-Z]+\d+(-\d+)?[a-z]*p[a-z]*(_|$)")
_FAILED = "ProvisioningState/failed/"

_POWER = {
    "starting": MachineState.starting,
    "running": MachineState.running,
    "stopping": MachineState.stopping,
    "deallocating": MachineState.stopping,
    "stopped": MachineState.stopped,
    "deallocated": MachineState.stopped,
}


def base_name(deployment: str, group: str) -> str:
    digest = hashlib.sha256(f"{deployment}\0{group}".encode()).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9]+", "-", group.lower()).strip("-")[:24].rstrip("-")
    return f"valohai-{readable or 'group'}-{digest}"


def machine_names(base: str, launch: Launch) -> list[str]:
    """The same for the same launch, so that a repeated one finds what the first one made."""
    digest = hashlib.sha256(launch.token.encode()).hexdigest()[:12]
    return [f"{base}-{digest}-{number}" for number in range(launch.count)]


def place_of(settings: AzureGroupSettings) -> str:
    """The path of the resource group."""
    return f"/subscriptions/{settings.subscription_id}/resourceGroups/{settings.resource_group}"


def scale_set_id(settings: AzureGroupSettings, base: str) -> str:
    return f"{place_of(settings)}/providers/Microsoft.Compute/virtualMachineScaleSets/{base}"


def _path(settings: AzureGroupSettings, kind: str, name: str) -> str:
    return name if name.startswith("/") else f"{place_of(settings)}/providers/{kind}/{name}"


def subnet_path(settings: AzureGroupSettings) -> str | None:
    """Subnets span the zones of a region: the first one is used. None without enough to name it."""
    if not settings.subnets:
        return None
    subnet = settings.subnets[0]
    if subnet.startswith("/"):
        return subnet
    if not settings.network:
        return None
    network = _path(settings, "Microsoft.Network/virtualNetworks", settings.network)
    return f"{network}/subnets/{subnet}"


def image_of(settings: AzureGroupSettings) -> dict[str, str]:
    """An image's path, or `publisher:offer:sku:version`."""
    image = settings.image
    if not image:
        arm = _ARM_SIZE.match(settings.instance_type)
        image = f"{UBUNTU}-arm64:latest" if arm else f"{UBUNTU}:latest"
    if image.startswith("/"):
        return {"id": image}
    parts = image.split(":")
    if len(parts) != 4:
        return {"id": _path(settings, "Microsoft.Compute/images", image)}
    return dict(zip(("publisher", "offer", "sku", "version"), parts, strict=True))


def scale_set_body(
    settings: AzureGroupSettings, zones: Sequence[str], *, deployment: str, group: str
) -> dict[str, Any]:
    ours = {"valohai": "1", "valohai-deployment": deployment, "valohai-group": group}
    body: dict[str, Any] = {
        "location": settings.region,
        "tags": {**settings.tags, **ours},
        "properties": {"orchestrationMode": "Flexible", "platformFaultDomainCount": 1},
    }
    return {**body, "zones": list(zones)} if zones else body


def machine_body(
    name: str,
    launch: Launch,
    settings: AzureGroupSettings,
    *,
    deployment: str,
    group: str,
    public_key: str,
) -> dict[str, Any]:
    """`public_key`: Azure makes no machine without one or a password."""
    base = base_name(deployment, group)
    tags = {**settings.tags, **identity_tags(deployment, group, launch)}
    disk = {
        "createOption": "FromImage",
        "deleteOption": "Delete",
        "diskSizeGB": settings.disk_gb,
        "managedDisk": {"storageAccountType": "StandardSSD_LRS"},
    }
    properties: dict[str, Any] = {
        "virtualMachineScaleSet": {"id": scale_set_id(settings, base)},
        "hardwareProfile": {"vmSize": settings.instance_type},
        "storageProfile": {"imageReference": image_of(settings), "osDisk": disk},
        "osProfile": _system(name, launch.user_data, public_key),
        "networkProfile": _network(name, settings),
        **_price(launch.purchase, settings),
    }
    body: dict[str, Any] = {"location": settings.region, "tags": tags, "properties": properties}
    if launch.zone:
        body["zones"] = [launch.zone]
    if settings.service_account:
        kind = "Microsoft.ManagedIdentity/userAssignedIdentities"
        account = _path(settings, kind, settings.service_account)
        body["identity"] = {"type": "UserAssigned", "userAssignedIdentities": {account: {}}}
    return body


def _system(name: str, user_data: str, public_key: str) -> dict[str, Any]:
    """User data is Azure's custom data: cloud-init runs it, and it cannot be read back through the API."""
    path = f"/home/{ADMIN}/.ssh/authorized_keys"
    return {
        "computerName": name,
        "adminUsername": ADMIN,
        "customData": base64.b64encode(user_data.encode()).decode(),
        "linuxConfiguration": {
            "disablePasswordAuthentication": True,
            "ssh": {"publicKeys": [{"path": path, "keyData": public_key}]},
        },
    }


def _network(name: str, settings: AzureGroupSettings) -> dict[str, Any]:
    """All of it is deleted with the machine."""
    address: dict[str, Any] = {"subnet": {"id": subnet_path(settings)}, "primary": True}
    if settings.public_address:
        address["publicIPAddressConfiguration"] = {
            "name": f"{name}-ip",
            "sku": {"name": "Standard"},
            "properties": {"deleteOption": "Delete", "publicIPAllocationMethod": "Static"},
        }
    interface: dict[str, Any] = {
        "primary": True,
        "deleteOption": "Delete",
        "ipConfigurations": [{"name": "primary", "properties": address}],
    }
    if settings.security_groups:
        kind = "Microsoft.Network/networkSecurityGroups"
        group = _path(settings, kind, settings.security_groups[0])
        interface["networkSecurityGroup"] = {"id": group}
    return {
        "networkApiVersion": NETWORK_API,
        "networkInterfaceConfigurations": [{"name": f"{name}-nic", "properties": interface}],
    }


def _price(purchase: Purchase, settings: AzureGroupSettings) -> dict[str, Any]:
    if purchase is Purchase.on_demand:
        return {"priority": "Regular"}
    most = settings.spot_max_price  # none and 0: whatever it costs, up to the ordinary price
    return {
        "priority": "Spot",
        "evictionPolicy": "Delete",
        "billingProfile": {"maxPrice": float(most or -1)},
    }


def is_ours(tags: Any, *, deployment: str, group: str) -> bool:
    marks = (tags or {}).get("valohai-deployment"), (tags or {}).get("valohai-group")
    return marks == (deployment, group)


def failure(machine: Any) -> tuple[str, str] | None:
    """Code and words of why it could not be made. One that has a power state was made, whatever failed after."""
    statuses = _statuses(machine)
    if machine.properties.provisioning_state != "Failed" or _power(statuses):
        return None
    for status in statuses:
        if status.code.startswith(_FAILED):
            return status.code.removeprefix(_FAILED), status.message or status.code
    return "ProvisioningFailed", "the machine could not be made"


def being_made(machine: Any) -> bool:
    """Neither here nor refused yet."""
    creating = machine.properties.provisioning_state == "Creating"
    return creating and not _power(_statuses(machine))


def powered_off(machine: Any) -> bool:
    """By itself: it is still paid for. What is stopped by us is given back to the cloud (deallocated)."""
    settled = machine.properties.provisioning_state == "Succeeded"
    return settled and _power(_statuses(machine)) == "stopped"


def state_of(machine: Any) -> MachineState:
    if machine.properties.provisioning_state == "Deleting":
        return MachineState.terminating
    return _POWER.get(_power(_statuses(machine)), MachineState.starting)


def machine_of(machine: Any, *, created_at: Any, state: MachineState) -> Machine:
    spot = machine.properties.priority == "Spot"
    return Machine(
        id=machine.name,
        zone=next(iter(machine.zones or ()), ""),
        purchase=Purchase.spot if spot else Purchase.on_demand,
        state=state,
        created_at=created_at,
        token=machine.tags.get("valohai-launch"),
        bootstrap=machine.tags.get("valohai-bootstrap"),
    )


def _statuses(machine: Any) -> Sequence[Any]:
    view = machine.properties.instance_view
    return (view.statuses or ()) if view else ()


def _power(statuses: Sequence[Any]) -> str:
    codes = (status.code for status in statuses)
    found = (code.partition("/")[2] for code in codes if code.startswith("PowerState/"))
    return next(found, "")
