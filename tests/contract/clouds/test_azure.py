"""What only Azure does, against the stand-in of tests/support/clouds/azure_compute.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clouds.azure_compute import SECRET, ZONES, AzureCompute, Machine
from tests.support.clouds.azure_models import Unacceptable, check
from tests.support.clouds.rigs import azure
from valohai_dagster.capacity.clouds.azure import AzureDriver
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble
from valohai_dagster.capacity.model import MachineState, Purchase

NO_ROOM = ("AllocationFailed", "We do not have sufficient capacity")


@pytest.fixture(scope="module")
def server() -> Iterator[AzureCompute]:
    with azure.serving() as serving:
        yield serving


@pytest.fixture
def rig(server: AzureCompute, tmp_path: Path) -> Iterator[azure.AzureRig]:
    with azure.opened(server, tmp_path) as opened:
        yield opened


def running(
    rig: azure.AzureRig, driver: AzureDriver, token: str = "t-1", *, count: int = 1
) -> list[str]:
    ids = list(driver.launch(Launch(token=token, count=count)))
    rig.settle()
    return ids


def fails_to_come(machine: Machine) -> None:
    """As when there is no room, after the request was accepted."""
    machine.provisioning, machine.power, machine.error = "Failed", "", NO_ROOM


def test_a_refusal_that_comes_later_is_raised_by_the_next_launch_there(rig: azure.AzureRig) -> None:
    driver = rig.driver()
    (first,) = driver.launch(Launch(token="t-1"))
    fails_to_come(rig.world.machines[first])
    assert [one.state for one in driver.list()] == [MachineState.terminating]
    rig.settle()
    assert rig.world.machines == {}
    with pytest.raises(CloudError, match="sufficient capacity") as caught:
        driver.launch(Launch(token="t-2"))
    assert caught.value.trouble is Trouble.capacity
    assert (caught.value.zone, caught.value.purchase) == (None, Purchase.on_demand)
    assert driver.launch(Launch(token="t-3"))


def test_machines_that_come_are_kept_when_others_of_the_launch_do_not(
    rig: azure.AzureRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([None, NO_ROOM, None])
    monkeypatch.setattr(rig.world, "_error", lambda body: next(errors))
    driver = rig.driver()
    with pytest.raises(CloudError, match="sufficient capacity") as caught:
        running(rig, driver, count=3)
    rig.settle()
    assert sorted(caught.value.made) == sorted(one.id for one in driver.list())
    assert len(caught.value.made) == 2


def test_a_machine_that_powered_itself_off_is_deleted(rig: azure.AzureRig) -> None:
    """The dead-man timer does so; Azure would be paid for it until it is given back."""
    driver = rig.driver()
    (first,) = running(rig, driver)
    rig.world.machines[first].power = "stopped"
    assert [one.state for one in driver.list()] == [MachineState.terminating]
    rig.settle()
    assert list(driver.list()) == []


def test_a_machine_that_could_not_be_started_again_stays_stopped(rig: azure.AzureRig) -> None:
    driver = rig.driver()
    (first,) = running(rig, driver)
    driver.stop(first)
    rig.settle()
    rig.world.machines[first].provisioning = "Failed"
    assert [one.state for one in driver.list()] == [MachineState.stopped]


def test_zones_are_added_to_the_scale_set(rig: azure.AzureRig) -> None:
    rig.driver(zones=["1"]).launch(Launch(token="t-1", zone="1"))
    rig.driver(zones=["2"]).launch(Launch(token="t-2", zone="2"))
    rig.settle()
    (found,) = rig.world.sets.values()
    assert found["zones"] == ["1", "2"]
    assert sorted(one.zone for one in rig.driver().list()) == ["1", "2"]


def test_a_scale_set_that_was_deleted_by_hand_is_made_again(rig: azure.AzureRig) -> None:
    driver = rig.driver()
    (first,) = running(rig, driver)
    rig.world.sets.clear()
    rig.world.machines.clear()
    assert list(driver.list()) == []
    driver.terminate(first)
    with pytest.raises(CloudError):
        driver.launch(Launch(token="t-2"))
    assert running(rig, driver, "t-3")


def test_a_launch_without_a_subnet_is_refused_before_anything_is_made(rig: azure.AzureRig) -> None:
    with pytest.raises(CloudError, match="subnets") as caught:
        rig.driver(subnets=[]).launch(Launch(token="t-1"))
    assert caught.value.trouble is Trouble.invalid
    assert rig.world.sets == {}


def test_a_throttle_says_how_long_to_wait(rig: azure.AzureRig) -> None:
    with rig.refuse(Trouble.throttled), pytest.raises(CloudError) as caught:
        rig.driver().list()
    assert caught.value.retry_after == 7
    assert len(rig.world.requests) == 1  # the library repeats nothing on its own


def test_a_resource_group_that_is_not_there_is_no_empty_list(rig: azure.AzureRig) -> None:
    driver = rig.driver(resource_group="nowhere")
    with pytest.raises(CloudError) as caught:
        driver.list()
    assert caught.value.trouble is Trouble.invalid


def test_each_machine_has_a_key_that_nobody_has(rig: azure.AzureRig) -> None:
    ids = running(rig, rig.driver(), count=2)
    systems = [rig.world.machines[one].body["properties"]["osProfile"] for one in ids]
    keys = [one["linuxConfiguration"]["ssh"]["publicKeys"][0]["keyData"] for one in systems]
    assert all(key.startswith("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5") for key in keys)
    assert len(set(keys)) == 2


def test_a_wrong_secret_is_told_without_showing_it(rig: azure.AzureRig) -> None:
    with pytest.raises(CloudError, match="app-of-tests") as caught:
        rig.driver(client_secret="not-" + SECRET).list()
    assert caught.value.trouble is Trouble.credentials
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("changes", [{"tenant_id": None}, {"tenant_id": "no directory"}])
def test_an_unfinished_app_registration_is_told(
    rig: azure.AzureRig, changes: dict[str, Any]
) -> None:
    with pytest.raises(CloudError) as caught:
        rig.driver(**changes).list()
    assert caught.value.trouble is Trouble.credentials


def test_a_quota_of_nothing_is_told_by_the_check(rig: azure.AzureRig) -> None:
    rig.world.quotas = {"standardDSv5Family": 0, "lowPriorityCores": 10}
    assert any("standardDSv5Family" in one for one in rig.driver().check())
    assert list(rig.driver(spot=True).check()) == []


def test_e61_rights_in_the_resource_group_are_enough(rig: azure.AzureRig) -> None:
    rig.world.group_only = True
    driver = rig.driver()
    assert list(driver.check()) == []
    (first,) = running(rig, driver)
    driver.terminate(first)
    rig.settle()
    assert list(driver.list()) == []


def test_nobody_answers(rig: azure.AzureRig) -> None:
    with pytest.raises(CloudError) as caught:
        rig.driver(endpoint_url="https://127.0.0.1:9").list()
    assert caught.value.trouble in (Trouble.outage, Trouble.credentials)


def test_a_launch_in_a_zone_is_made_there_by_the_price_that_it_says(rig: azure.AzureRig) -> None:
    driver = rig.driver(zones=list(ZONES), spot=True)
    driver.launch(Launch(token="t-1", zone="3", purchase=Purchase.spot))
    rig.settle()
    (one,) = driver.list()
    assert (one.zone, one.purchase) == ("3", Purchase.spot)


# -- the stand-in itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"locatoin": "x"},
        {"properties": {"osProfile": {"customDate": "x"}}},
        {"properties": {"priority": "Cheap"}},
        {
            "properties": {
                "networkProfile": {"networkInterfaceConfigurations": [{"properties": {"x": 1}}]}
            }
        },
    ],
)
def test_bodies_that_the_models_do_not_have_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(Unacceptable):
        check("VirtualMachine", body)
