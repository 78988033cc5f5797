from __future__ import annotations

import base64
import re
from types import SimpleNamespace
from typing import Any

import pytest

from valohai_dagster.capacity.clouds.azure_resources import (
    base_name,
    being_made,
    failure,
    image_of,
    is_ours,
    machine_body,
    machine_names,
    powered_off,
    scale_set_body,
    state_of,
    subnet_path,
)
from valohai_dagster.capacity.clouds.base import Launch
from valohai_dagster.capacity.model import MachineState, Purchase
from valohai_dagster.settings_groups import AzureGroupSettings

_PLACE = "/subscriptions/s/resourceGroups/r/providers"


def settings(**changes: Any) -> AzureGroupSettings:
    values = {
        "kind": "azure",
        "subscription_id": "s",
        "resource_group": "r",
        "region": "northeurope",
        "instance_type": "Standard_D2s_v5",
        "network": "n",
        "subnets": ["workers"],
    }
    return AzureGroupSettings.model_validate({**values, **changes})


def body(launch: Launch | None = None, **changes: Any) -> dict[str, Any]:
    return machine_body(
        "m",
        launch or Launch(token="t", user_data="#!/bin/sh\n"),
        settings(**changes),
        deployment="d",
        group="g",
        public_key="ssh-ed25519 AAAA",
    )


def machine(provisioning: str, *codes: str) -> Any:
    statuses = [SimpleNamespace(code=code, message="words") for code in codes]
    view = SimpleNamespace(statuses=statuses)
    return SimpleNamespace(
        properties=SimpleNamespace(provisioning_state=provisioning, instance_view=view)
    )


@pytest.mark.parametrize("group", ["g", "GPU machines of the Team", "_", "ä" * 80])
def test_names_are_host_names(group: str) -> None:
    names = machine_names(base_name("deployment", group), Launch(token="t" * 200, count=120))
    assert all(re.fullmatch(r"valohai-[a-z0-9-]{1,55}", name) for name in names)
    assert len(set(names)) == 120


def test_nothing_of_a_machine_outlives_it() -> None:
    properties = body()["properties"]
    interface = properties["networkProfile"]["networkInterfaceConfigurations"][0]["properties"]
    address = interface["ipConfigurations"][0]["properties"]["publicIPAddressConfiguration"]
    options = (properties["storageProfile"]["osDisk"], interface, address["properties"])
    assert [one["deleteOption"] for one in options] == ["Delete"] * 3


def test_user_data_is_custom_data() -> None:
    system = body()["properties"]["osProfile"]
    assert base64.b64decode(system["customData"]) == b"#!/bin/sh\n"
    assert system["linuxConfiguration"]["disablePasswordAuthentication"] is True


def test_spot_machines_are_deleted_when_they_are_reclaimed() -> None:
    spot = Launch(token="t", purchase=Purchase.spot)
    properties = body(spot, spot=True, spot_max_price="0.25")["properties"]
    assert (properties["priority"], properties["evictionPolicy"]) == ("Spot", "Delete")
    assert properties["billingProfile"] == {"maxPrice": 0.25}
    assert body(spot, spot=True)["properties"]["billingProfile"] == {"maxPrice": -1}
    assert body(spot, spot=True, spot_max_price="0")["properties"]["billingProfile"] == {
        "maxPrice": -1
    }
    assert "evictionPolicy" not in body()["properties"]


def test_names_of_the_settings_are_things_of_the_resource_group() -> None:
    found = body(
        security_groups=["fence"], service_account="me", image="mine", public_address=False
    )
    properties = found["properties"]
    interface = properties["networkProfile"]["networkInterfaceConfigurations"][0]["properties"]
    address = interface["ipConfigurations"][0]["properties"]
    network = f"{_PLACE}/Microsoft.Network"
    assert interface["networkSecurityGroup"] == {"id": f"{network}/networkSecurityGroups/fence"}
    assert address == {
        "subnet": {"id": f"{network}/virtualNetworks/n/subnets/workers"},
        "primary": True,
    }
    account = f"{_PLACE}/Microsoft.ManagedIdentity/userAssignedIdentities/me"
    assert found["identity"]["userAssignedIdentities"] == {account: {}}
    image = properties["storageProfile"]["imageReference"]
    assert image == {"id": f"{_PLACE}/Microsoft.Compute/images/mine"}


def test_a_subnet_needs_its_network_or_its_path() -> None:
    assert subnet_path(settings(subnets=["/x"], network="")) == "/x"
    assert subnet_path(settings(network="")) is None
    assert subnet_path(settings(subnets=[])) is None


@pytest.mark.parametrize(
    ("size", "image", "sku"),
    [
        ("Standard_D2s_v5", "", "server"),
        ("Standard_D2ps_v5", "", "server-arm64"),
        ("Standard_E4pds_v6", "", "server-arm64"),
        ("Standard_NP10s", "", "server"),
        ("Standard_D2s_v5", "P:O:S:1.0", "S"),
    ],
)
def test_images(size: str, image: str, sku: str) -> None:
    assert image_of(settings(instance_type=size, image=image))["sku"] == sku


def test_a_scale_set_has_no_profile_and_so_scales_nothing() -> None:
    found = scale_set_body(settings(), ["1", "2"], deployment="d", group="g")
    assert found["properties"] == {"orchestrationMode": "Flexible", "platformFaultDomainCount": 1}
    assert found["zones"] == ["1", "2"]
    assert "zones" not in scale_set_body(settings(), [], deployment="d", group="g")


def test_tags_of_the_settings_do_not_make_a_machine_somebody_elses() -> None:
    tags = body(tags={"valohai-group": "other", "team": "a"})["tags"]
    assert is_ours(tags, deployment="d", group="g")
    assert tags["team"] == "a"
    assert not is_ours(None, deployment="d", group="g")


@pytest.mark.parametrize(
    ("provisioning", "power", "state"),
    [
        ("Creating", "", MachineState.starting),
        ("Succeeded", "running", MachineState.running),
        ("Updating", "deallocating", MachineState.stopping),
        ("Succeeded", "deallocated", MachineState.stopped),
        ("Updating", "starting", MachineState.starting),
        ("Failed", "running", MachineState.running),
        ("Deleting", "running", MachineState.terminating),
    ],
)
def test_states(provisioning: str, power: str, state: MachineState) -> None:
    codes = [f"PowerState/{power}"] if power else []
    assert state_of(machine(provisioning, *codes)) is state


def test_only_a_machine_without_power_state_could_not_be_made() -> None:
    code = "ProvisioningState/failed/ZonalAllocationFailed"
    assert failure(machine("Failed", code)) == ("ZonalAllocationFailed", "words")
    assert failure(machine("Failed")) is not None
    assert failure(machine("Failed", code, "PowerState/running")) is None
    assert failure(machine("Succeeded")) is None
    assert being_made(machine("Creating"))
    assert not being_made(machine("Creating", "PowerState/starting"))


def test_what_powered_itself_off_is_told_from_what_was_stopped() -> None:
    assert powered_off(machine("Succeeded", "PowerState/stopped"))
    assert not powered_off(machine("Succeeded", "PowerState/deallocated"))
    assert not powered_off(machine("Updating", "PowerState/stopped"))
