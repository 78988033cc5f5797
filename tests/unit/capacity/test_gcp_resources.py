from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from valohai_dagster.capacity.clouds.base import Launch
from valohai_dagster.capacity.clouds.gcp_resources import (
    base_name,
    ended,
    failed,
    image_of,
    labels,
    machine_names,
    manager_body,
    manager_name,
    region_of,
    state_of,
    subnet_path,
    template_body,
)
from valohai_dagster.capacity.model import MachineState, Purchase
from valohai_dagster.settings_groups import GcpGroupSettings

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1035, as Google wants it


def settings(**changes: Any) -> GcpGroupSettings:
    values = {
        "kind": "gcp",
        "project": "p",
        "region": "europe-north1",
        "instance_type": "e2-standard-2",
    }
    return GcpGroupSettings.model_validate({**values, **changes})


def member(**changes: Any) -> Any:
    errors = SimpleNamespace(errors=SimpleNamespace(errors=changes.pop("errors", [])))
    values = {"current_action": "NONE", "instance_status": "RUNNING", "target_status": "RUNNING"}
    return SimpleNamespace(**{**values, **changes}, last_attempt=errors)


def body(purchase: Purchase = Purchase.on_demand, **changes: Any) -> dict[str, Any]:
    return template_body(settings(**changes), deployment="d", group="g", purchase=purchase)


@pytest.mark.parametrize("group", ["g", "GPU machines of the Team", "_", "ä" * 80, "x-" * 80])
def test_e60_all_names_start_with_valohai_and_are_names_to_google(group: str) -> None:
    base = base_name("deployment", group)
    names = [manager_name(base, one) for one in Purchase]
    names += machine_names(base, Launch(token="t" * 200, count=120))
    assert all(_NAME.fullmatch(name) and name.startswith("valohai-") for name in names)
    assert len(set(names)) == len(names)
    assert len(manager_body(base, Purchase.spot, project="p", template="t")["name"]) < 59


def test_names_differ_by_deployment_group_and_token() -> None:
    one, other = base_name("d", "g"), base_name("e", "g")
    assert one != other != base_name("e", "G")
    assert machine_names(one, Launch(token="a")) != machine_names(one, Launch(token="b"))


def test_labels_hold_what_labels_can() -> None:
    found = labels(settings(tags={"Cost-Centre": "R&D"}), "Dep.1", "GPU")
    assert found == {
        "cost-centre": "r_d",
        "valohai": "1",
        "valohai-deployment": "dep_1",
        "valohai-group": "gpu",
    }


def test_a_template_is_named_after_its_content() -> None:
    assert body()["name"] == body()["name"] != body(disk_gb=99)["name"]
    assert body()["name"] != body(Purchase.spot)["name"]


def test_spot_machines_are_deleted_when_they_are_reclaimed() -> None:
    scheduling = body(Purchase.spot)["properties"]["scheduling"]
    assert scheduling["provisioning_model"] == "SPOT"
    assert scheduling["instance_termination_action"] == "DELETE"
    assert scheduling["on_host_maintenance"] == "TERMINATE"


def test_machines_with_gpus_cannot_be_moved() -> None:
    properties = body(accelerator="nvidia-tesla-t4", gpus=2)["properties"]
    assert properties["scheduling"]["on_host_maintenance"] == "TERMINATE"
    assert properties["guest_accelerators"] == [
        {"accelerator_type": "nvidia-tesla-t4", "accelerator_count": 2}
    ]
    assert body()["properties"]["scheduling"]["on_host_maintenance"] == "MIGRATE"


@pytest.mark.parametrize(
    ("machine_type", "disk"), [("c4a-standard-4", "hyperdisk-balanced"), ("n1-x", "pd-balanced")]
)
def test_the_disk_is_one_that_the_machine_type_can_have(machine_type: str, disk: str) -> None:
    properties = body(instance_type=machine_type)["properties"]
    assert properties["disks"][0]["initialize_params"]["disk_type"] == disk


def test_network_tags_service_account_and_address() -> None:
    properties = body(
        security_groups=["mine"],
        service_account="a@p.iam",
        network="n",
        subnets=["s"],
        public_address=False,
    )["properties"]
    assert properties["tags"] == {"items": ["mine", "valohai-worker"]}
    assert properties["service_accounts"][0]["email"] == "a@p.iam"
    path = "projects/p/regions/europe-north1/subnetworks/s"
    assert properties["network_interfaces"] == [{"subnetwork": path}]
    assert "access_configs" in body()["properties"]["network_interfaces"][0]


@pytest.mark.parametrize(
    ("machine_type", "image", "path"),
    [
        ("e2-x", "", "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64"),
        ("t2a-x", "", "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-arm64"),
        ("e2-x", "mine", "projects/p/global/images/mine"),
        ("e2-x", "family/mine", "projects/p/global/images/family/mine"),
        ("e2-x", "projects/q/global/images/i", "projects/q/global/images/i"),
    ],
)
def test_images(machine_type: str, image: str, path: str) -> None:
    assert image_of(settings(instance_type=machine_type, image=image)) == path


def test_the_region_is_that_of_the_first_zone_when_none_is_set() -> None:
    zonal = settings(region="", zones=["europe-north1-b"], subnets=["s"])
    assert region_of(zonal) == "europe-north1"
    assert subnet_path(zonal) == "projects/p/regions/europe-north1/subnetworks/s"
    assert region_of(settings(region="")) == ""


@pytest.mark.parametrize(
    ("action", "status", "state"),
    [
        ("CREATING", "", MachineState.starting),
        ("VERIFYING", "RUNNING", MachineState.running),
        ("NONE", "STAGING", MachineState.starting),
        ("STOPPING", "RUNNING", MachineState.stopping),
        ("NONE", "TERMINATED", MachineState.stopped),
        ("STARTING", "TERMINATED", MachineState.stopped),  # there may be no room for it
        ("STARTING", "PROVISIONING", MachineState.starting),
        ("DELETING", "RUNNING", MachineState.terminating),
        ("ABANDONING", "RUNNING", MachineState.terminating),
    ],
)
def test_states(action: str, status: str, state: MachineState) -> None:
    assert state_of(member(current_action=action, instance_status=status)) is state


def test_what_ended_by_itself_is_told_from_what_was_stopped() -> None:
    assert ended(member(instance_status=""))
    assert ended(member(instance_status="TERMINATED"))
    assert not ended(member(instance_status="TERMINATED", target_status="STOPPED"))
    assert not ended(member(instance_status="", current_action="CREATING"))
    assert not ended(member())


def test_only_what_is_being_made_and_is_not_there_has_failed() -> None:
    making = {"current_action": "CREATING", "instance_status": ""}
    assert failed(member(**making, errors=["no room"]))
    assert not failed(member(**making))
    assert not failed(member(current_action="DELETING", errors=["slow"]))
