"""What containers as machines have beside what all clouds have; on the machine's own Docker daemon."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from tests.support.podman import busybox_root
from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble
from valohai_dagster.capacity.clouds.docker import DockerDriver
from valohai_dagster.capacity.model import MachineState
from valohai_dagster.settings_groups import DockerGroupSettings

if TYPE_CHECKING:
    from docker import DockerClient

DEPLOYMENT = "docker-machines-of-tests"
IMAGE = "valohai-dagster-test-bare:1"


class Host:
    """The daemon, and drivers on it whose clocks are ahead by as much as is asked for."""

    def __init__(self, client: DockerClient) -> None:
        self.client = client
        self._drivers: list[DockerDriver] = []

    def driver(self, *, ahead: timedelta = timedelta(), **changes: object) -> DockerDriver:
        settings = DockerGroupSettings.model_validate(
            {"kind": "docker", "image": IMAGE, "cpus": 0.5, "memory_gb": 0.1, **changes}
        )
        clock = lambda: utcnow() + ahead  # noqa: E731
        self._drivers.append(DockerDriver("g", settings, deployment=DEPLOYMENT, clock=clock))
        return self._drivers[-1]

    def clear(self) -> None:
        for driver in self._drivers:
            driver.close()
        marks: dict[str, str | list[str] | bool] = {"label": f"valohai-deployment={DEPLOYMENT}"}
        for one in self.client.containers.list(all=True, filters=marks):
            one.remove(force=True)


@pytest.fixture
def host(docker_client: DockerClient) -> Iterator[Host]:
    docker_client.api.import_image_from_data(busybox_root(), *IMAGE.split(":"))
    host = Host(docker_client)
    host.clear()
    yield host
    host.clear()


def test_a_machine_whose_user_data_has_ended_is_gone_and_leaves_its_output_for_a_while(
    host: Host,
) -> None:
    script = "echo I am $VALOHAI_AGENT_MACHINE_ID; cat /etc/hostname; exit 3"
    (name,) = host.driver().launch(Launch(token="t", user_data=script))
    container = host.client.containers.get(name)
    container.wait(timeout=30)
    (machine,) = host.driver().list()
    assert (machine.id, machine.state) == (name, MachineState.gone)
    assert container.logs().decode() == f"I am {name}\n{name}\n"
    host.driver().launch(Launch(token="t", user_data=script))
    assert host.driver().list() == [machine]
    assert host.driver(ahead=timedelta(minutes=16)).list() == []
    assert host.client.containers.list(all=True, filters={"name": name}) == []


def test_a_machine_has_the_cores_and_memory_of_the_settings_and_finds_its_host(host: Host) -> None:
    (name,) = host.driver().launch(Launch(token="t", user_data="cat /etc/hosts"))
    container = host.client.containers.get(name)
    container.wait(timeout=30)
    limits = container.attrs["HostConfig"]
    assert (limits["NanoCpus"], limits["Memory"]) == (500_000_000, 100_000_000)
    assert "host.docker.internal" in container.logs().decode()


def test_a_launch_that_was_interrupted_before_its_start_is_completed(host: Host) -> None:
    driver, launch = host.driver(), Launch(token="t", count=2, user_data="sleep 60")
    first, second = driver.launch(launch)
    for name in (first, second):
        host.client.containers.get(name).remove(force=True)
    host.client.containers.create(IMAGE, ["sleep", "60"], name=first, labels=_marks())
    states = {one.id: one.state for one in driver.list()}
    assert states == {first: MachineState.starting}
    driver.launch(launch)
    states = {one.id: one.state for one in driver.list()}
    assert states == {first: MachineState.running, second: MachineState.running}


def _marks() -> dict[str, str]:
    return {"valohai-deployment": DEPLOYMENT, "valohai-group": "g", "valohai-launch": "t"}


def test_an_image_that_cannot_be_pulled_is_surely_refused(host: Host) -> None:
    """Whatever stands between the daemon and the registry: no machine was made, so nobody has to wait for one."""
    driver = host.driver(image="registry.invalid/no-such-image:9")
    with pytest.raises(CloudError, match="could not pull it") as caught:
        driver.launch(Launch(token="t"))
    assert caught.value.trouble is Trouble.invalid
    assert list(driver.list()) == []
