"""What is particular to Nova, on the stand-in of tests/support/clouds/openstack_api.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clouds.openstack_api import PASSWORD, PROJECT, REGION, USER, OpenStack, Refusal
from tests.support.clouds.rigs.openstack import StandInRig
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble
from valohai_dagster.capacity.model import MachineState, Purchase


@pytest.fixture
def cloud() -> Iterator[OpenStack]:
    with OpenStack() as cloud:
        yield cloud


@pytest.fixture
def rig(cloud: OpenStack) -> Iterator[StandInRig]:
    rig = StandInRig(cloud)
    yield rig
    rig.close()


def test_a_launch_repeated_after_its_server_was_deleted_makes_none(
    cloud: OpenStack, rig: StandInRig
) -> None:
    """Nova shows deleted servers only to those who ask for changes, and without their metadata."""
    (made,) = rig.driver().launch(Launch(token="t"))
    cloud.settle()
    rig.driver().terminate(made)
    cloud.settle()
    assert rig.driver().launch(Launch(token="t")) == []
    assert len(cloud.servers) == 1


def test_a_server_that_never_came_up_is_deleted_and_no_host_is_a_matter_of_the_zone(
    cloud: OpenStack, rig: StandInRig
) -> None:
    cloud.full["north"] = 0
    with pytest.raises(CloudError, match="No valid host was found") as caught:
        rig.driver().launch(Launch(token="t", zone="north"))
    assert caught.value.zone == "north"
    cloud.settle()
    assert rig.driver().list() == []


def test_a_server_that_failed_later_while_it_ran_is_not_deleted(
    cloud: OpenStack, rig: StandInRig
) -> None:
    (made,) = rig.driver().launch(Launch(token="t"))
    cloud.settle()
    cloud.servers[made]["status"] = "ERROR"
    (machine,) = rig.driver().list()
    assert machine.state is MachineState.running


def test_a_volume_of_its_own(cloud: OpenStack, rig: StandInRig) -> None:
    driver = rig.driver(boot_from_volume=True, security_groups=["egress"])
    assert driver.check() == []
    assert len(driver.launch(Launch(token="t"))) == 1


def test_spot_is_refused_in_words(rig: StandInRig) -> None:
    with pytest.raises(CloudError, match="no spot machines"):
        rig.driver().launch(Launch(token="t", purchase=Purchase.spot))


def test_credentials_that_are_corrected_are_read_again(
    cloud: OpenStack, rig: StandInRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "clouds.yaml"
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(file))

    def write(password: str) -> None:
        auth = f"auth_url: {cloud.auth_url}, username: {USER}, password: {password}"
        names = "user_domain_name: Default, project_domain_name: Default"
        auth = f"{{{auth}, project_name: {PROJECT}, {names}}}"
        file.write_text(f"clouds: {{lab: {{region_name: {REGION}, auth: {auth}}}}}")

    rig.defaults = {"cloud": "lab"}
    driver = rig.driver()
    write("wrong")
    with pytest.raises(CloudError) as caught:
        driver.list()
    assert caught.value.trouble is Trouble.credentials
    write(PASSWORD)
    assert list(driver.list()) == []


def test_a_server_that_powered_itself_off_is_deleted(cloud: OpenStack, rig: StandInRig) -> None:
    """The dead man's switch does so; also after it was stopped by us once, and started again."""
    driver = rig.driver()
    first, second = driver.launch(Launch(token="t", count=2))
    cloud.settle()
    driver.stop(second)
    cloud.settle()
    states = {one.id: one.state for one in driver.list()}
    assert states == {first: MachineState.running, second: MachineState.stopped}
    driver.start(second)
    cloud.settle()
    assert {one.state for one in driver.list()} == {MachineState.running}
    for server in cloud.servers.values():
        server["status"] = "SHUTOFF"
    assert {one.state for one in driver.list()} == {MachineState.terminating}
    cloud.settle()
    assert list(driver.list()) == []


def test_a_server_that_may_not_be_deleted_does_not_spoil_the_list(
    cloud: OpenStack, rig: StandInRig, caplog: pytest.LogCaptureFixture
) -> None:
    """An administrator has stopped and locked it to look at it: it is listed as it is, and said once."""
    driver = rig.driver()
    first, second = driver.launch(Launch(token="t", count=2))
    cloud.settle()
    cloud.servers[first]["status"] = "SHUTOFF"

    def refuse(method: str, path: str) -> None:
        if method == "DELETE":
            raise Refusal(409, f"Instance {first} is locked")

    cloud.refuse = refuse
    for _ in range(2):
        states = {one.id: one.state for one in driver.list()}
        assert states == {first: MachineState.stopped, second: MachineState.running}
    assert caplog.text.count("is locked") == 1
