"""What only Google Compute Engine does, against the stand-in of tests/support/clouds/gce.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clouds.discovery import Unacceptable, compute
from tests.support.clouds.gce import PROJECT, ZONES, Gce, Machine, Refusal
from tests.support.clouds.rig import GROUP
from tests.support.clouds.rigs import gcp
from tests.support.servers.google_key import write_key
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble
from valohai_dagster.capacity.clouds.gcp import GcpDriver
from valohai_dagster.capacity.model import MachineState, Purchase

NO_ROOM = ("ZONE_RESOURCE_POOL_EXHAUSTED", "The zone does not have enough resources")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Gce, Path]]:
    with gcp.serving() as serving:
        yield serving


@pytest.fixture
def rig(server: tuple[Gce, Path], tmp_path: Path) -> Iterator[gcp.GcpRig]:
    with gcp.opened(server, tmp_path) as opened:
        yield opened


def running(rig: gcp.GcpRig, driver: GcpDriver, token: str = "t-1", *, count: int = 1) -> list[str]:
    ids = list(driver.launch(Launch(token=token, count=count, zone=ZONES[0])))
    rig.settle()
    return ids


def fails_to_come(machine: Machine) -> None:
    """As when the zone runs out of room after the request was accepted."""
    machine.action, machine.status, machine.error = "CREATING", "", NO_ROOM


def test_a_refusal_that_comes_later_is_raised_by_the_next_launch_there(rig: gcp.GcpRig) -> None:
    driver = rig.driver(zones=list(ZONES))
    (first,) = driver.launch(Launch(token="t-1", zone=ZONES[0]))
    fails_to_come(rig.world.machine(first))
    assert [one.state for one in driver.list()] == [MachineState.terminating]
    rig.settle()
    assert rig.world.machines == []  # else Google would try for ever
    with pytest.raises(CloudError, match="does not have enough resources") as caught:
        driver.launch(Launch(token="t-2", zone=ZONES[0]))
    assert caught.value.trouble is Trouble.capacity
    assert (caught.value.zone, caught.value.purchase) == (ZONES[0], Purchase.on_demand)
    assert driver.launch(Launch(token="t-3", zone=ZONES[0]))


def test_machines_that_come_are_kept_when_others_of_the_launch_do_not(
    rig: gcp.GcpRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([None, NO_ROOM, None])
    monkeypatch.setattr(rig.world, "_error", lambda zone, *, spot: next(errors))
    driver = rig.driver()
    with pytest.raises(CloudError, match="does not have enough resources") as caught:
        running(rig, driver, count=3)
    rig.settle()
    assert sorted(caught.value.made) == sorted(one.id for one in driver.list())
    assert len(caught.value.made) == 2


def test_a_machine_that_powered_itself_off_is_deleted_and_not_replaced(rig: gcp.GcpRig) -> None:
    """The dead-man timer does so; its disk would be paid for."""
    driver = rig.driver()
    (first,) = running(rig, driver)
    rig.world.machine(first).status = "TERMINATED"
    assert [one.state for one in driver.list()] == [MachineState.terminating]
    rig.settle()
    assert list(driver.list()) == []
    assert rig.world.machines == []


def test_changed_settings_are_for_new_machines_only(rig: gcp.GcpRig) -> None:
    (first,) = running(rig, rig.driver())
    (old,) = rig.world.templates
    (second,) = running(rig, rig.driver(disk_gb=123), "t-2")
    (new,) = rig.world.templates
    assert old != new
    disks = [rig.world.machine(one).properties["disks"][0] for one in (first, second)]
    assert [disk["initializeParams"]["diskSizeGb"] for disk in disks] == ["50", "123"]


def test_a_template_is_kept_while_another_zone_has_it(rig: gcp.GcpRig) -> None:
    driver = rig.driver(zones=list(ZONES))
    for number, zone in enumerate(ZONES[:2]):
        driver.launch(Launch(token=f"t-{number}", zone=zone))
    running(rig, rig.driver(zones=list(ZONES), disk_gb=123), "t-9")
    assert len(rig.world.templates) == 2


def test_without_a_zone_the_next_one_of_the_region_is_tried(rig: gcp.GcpRig) -> None:
    driver = rig.driver()
    with rig.refuse(Trouble.capacity, zone=ZONES[0]):
        driver.launch(Launch(token="t-1"))
    rig.settle()
    assert [one.zone for one in driver.list()] == [ZONES[1]]


def test_without_room_in_any_zone_the_refusal_is_of_no_zone(rig: gcp.GcpRig) -> None:
    with rig.refuse(Trouble.capacity), pytest.raises(CloudError) as caught:
        rig.driver().launch(Launch(token="t-1"))
    assert (caught.value.trouble, caught.value.zone) == (Trouble.capacity, None)


def test_a_machine_type_that_no_zone_has_is_told_by_the_launch_too(rig: gcp.GcpRig) -> None:
    with pytest.raises(CloudError, match="'e9-none'") as caught:
        rig.driver(instance_type="e9-none").launch(Launch(token="t-1"))
    assert caught.value.trouble is Trouble.invalid
    custom = rig.driver(instance_type="n2-custom-4-8192")  # of no list: all zones are tried
    assert custom.launch(Launch(token="t-2"))


def test_machines_in_zones_that_left_the_settings_are_still_listed(rig: gcp.GcpRig) -> None:
    ids = running(rig, rig.driver())
    later = rig.driver(zones=[ZONES[2]], spot=True)
    assert [one.id for one in later.list()] == ids
    later.terminate(ids[0])
    rig.settle()
    assert list(later.list()) == []


def test_a_group_manager_that_was_deleted_by_hand_is_made_again(rig: gcp.GcpRig) -> None:
    driver = rig.driver()
    (first,) = running(rig, driver)
    rig.world.managers.clear()
    rig.world.machines.clear()
    driver.terminate(first)
    with pytest.raises(CloudError):
        driver.launch(Launch(token="t-2", zone=ZONES[0]))
    assert running(rig, driver, "t-3")


def test_a_machine_that_somebody_had_the_group_make_is_listed_without_token(
    rig: gcp.GcpRig,
) -> None:
    driver = rig.driver()
    (first,) = running(rig, driver)
    manager = rig.world.machine(first).manager
    rig.world.machines.append(Machine("by-hand", ZONES[0], manager=manager))
    tokens = {one.id: one.token for one in driver.list()}
    assert tokens == {first: "t-1", "by-hand": None}


def test_a_machine_that_is_not_ready_to_be_stopped_says_so(rig: gcp.GcpRig) -> None:
    driver = rig.driver()
    (first,) = driver.launch(Launch(token="t-1", zone=ZONES[0]))
    with pytest.raises(CloudError, match="starting just now") as caught:
        driver.stop(first)
    assert caught.value.trouble is Trouble.outage
    with pytest.raises(CloudError, match="no machine nobody"):
        driver.stop("nobody")


def test_user_data_stays_out_of_errors(rig: gcp.GcpRig, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "#!/bin/sh\n# join-token-of-tests\n"

    def echo(call: object) -> object:
        raise Unacceptable(f"Invalid value for field 'metadata': {secret}")

    monkeypatch.setattr(rig.world, "_instanceGroupManagers_createInstances", echo)
    with pytest.raises(CloudError) as caught:
        rig.driver().launch(Launch(token="t-1", zone=ZONES[0], user_data=secret))
    assert "Invalid value" in str(caught.value)
    assert "join-token-of-tests" not in str(caught.value)


def test_a_key_that_google_does_not_know_is_a_trouble_of_credentials(
    rig: gcp.GcpRig, tmp_path: Path
) -> None:
    file = write_key(tmp_path / "other.json", token_uri="http://127.0.0.1:9/none")
    driver = rig.driver(credentials_file=file)
    with pytest.raises(CloudError, match=GROUP) as caught:
        driver.list()
    assert caught.value.trouble is Trouble.credentials
    file.write_bytes(rig.key.read_bytes())  # corrected
    assert list(driver.list()) == []


def test_a_quota_of_nothing_is_told_by_the_check(rig: gcp.GcpRig) -> None:
    rig.world.quotas = {"CPUS": 0.0, "NVIDIA_T4_GPUS": 0.0}
    found = " ".join(rig.driver(accelerator="nvidia-tesla-t4", gpus=1).check())
    assert "quota CPUS" in found
    assert "quota NVIDIA_T4_GPUS" in found


def test_nobody_answers(rig: gcp.GcpRig) -> None:
    with pytest.raises(CloudError) as caught:
        rig.driver(endpoint_url="http://127.0.0.1:9").list()
    assert (caught.value.trouble, caught.value.code) == (Trouble.outage, "Unreachable")


def test_spot_and_ordinary_refusals_are_told_apart(rig: gcp.GcpRig) -> None:
    with rig.world.refusing(Refusal("quota", spot=True)):
        driver = rig.driver(spot=True, on_demand_fallback=True)
        with pytest.raises(CloudError) as caught:
            driver.launch(Launch(token="t-1", zone=ZONES[0], purchase=Purchase.spot))
        assert (caught.value.zone, caught.value.purchase) == (None, Purchase.spot)
        assert driver.launch(Launch(token="t-2", zone=ZONES[0]))


# -- the stand-in itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "path", "body"),
    [
        ("POST", "global/instanceTemplates", {"name": "t", "properties": {"machine": "e2"}}),
        ("POST", "global/instanceTemplates?typo=1", {"name": "t"}),
        ("POST", "global/instanceTemplate", {"name": "t"}),
        ("POST", f"zones/{ZONES[0]}/instanceGroupManagers", {"targetSize": "many"}),
        (
            "POST",
            f"zones/{ZONES[0]}/instanceGroupManagers",
            {"instanceLifecyclePolicy": {"defaultActionOnFailure": "DO_SOMETHING"}},
        ),
    ],
)
def test_requests_that_the_published_description_does_not_have_are_refused(
    verb: str, path: str, body: dict[str, object]
) -> None:
    with pytest.raises(Unacceptable):
        compute().read(verb, f"/compute/v1/projects/{PROJECT}/{path}", json.dumps(body).encode())
