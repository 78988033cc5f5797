"""Machines of the simulated kind with their real agents on this host, a real Redis, and the real service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.projects import spec_of, step_yaml, write_project
from tests.support.redis_server import RedisServer
from tests.support.service import running_service
from tests.support.small_cloud import until
from valohai_dagster.capacity.clouds import host_agents
from valohai_dagster.capacity.clouds.base import Launch
from valohai_dagster.capacity.clouds.simulated import SimulatedDriver
from valohai_dagster.capacity.model import MachineState
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import SimulatedGroupSettings

pytestmark = pytest.mark.redis
GROUP = "local"


def group(**values: object) -> SimulatedGroupSettings:
    quick = {"boot_delay_seconds": 0.1, "runtime": "process", "scale_down_grace_seconds": 0}
    return SimulatedGroupSettings.model_validate({"kind": "simulated", **quick, **values})


def agents_on(state_dir: Path) -> list[str]:
    """Names of agents whose processes live."""
    locks = (state_dir / "simulated" / GROUP).glob("*.lock")
    return sorted(one.stem for one in locks if host_agents.lock_held(one))


@pytest.fixture
def ended(tmp_path: Path, redis_server: RedisServer) -> Iterator[Path]:
    """A state directory of which no agent is left at the end."""
    state_dir = tmp_path / "state"
    yield state_dir
    driver = open_driver(state_dir, redis_server)
    for machine in driver.list():
        driver.terminate(machine.id)
    until(lambda: not agents_on(state_dir))


def open_driver(state_dir: Path, redis_server: RedisServer, **values: object) -> SimulatedDriver:
    return SimulatedDriver(
        GROUP,
        group(**values),
        deployment="d",
        state_dir=state_dir,
        redis_url=redis_server.unix_url,
    )


def test_machines_outlive_a_restart_and_end_when_they_are_terminated(
    ended: Path, redis_server: RedisServer
):
    first = open_driver(ended, redis_server, agents_per_machine=2)
    one, other = first.launch(Launch(token="t", count=2))
    until(lambda: len(agents_on(ended)) == 4)
    first.close()
    second = open_driver(ended, redis_server, agents_per_machine=2)
    assert sorted(machine.id for machine in second.list()) == sorted([one, other])
    second.launch(Launch(token="t", count=2))
    second.terminate(one)
    until(lambda: agents_on(ended) == [f"{other}-0", f"{other}-1"])
    second.stop(other)
    until(lambda: agents_on(ended) == [])


def test_an_agent_whose_starter_died_before_it_wrote_that_down_is_found(
    ended: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    driver = open_driver(ended, redis_server)
    write, died = Path.write_text, RuntimeError("died")

    def die(path: Path, text: str) -> int:
        if path.name.endswith("-0.json"):
            raise died
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", die)
    with pytest.raises(RuntimeError):
        driver.launch(Launch(token="t"))
    monkeypatch.undo()
    later = open_driver(ended, redis_server)
    (machine,) = later.list()
    until((ended / "simulated" / GROUP / f"{machine.id}-0.json").exists)
    assert agents_on(ended) == [f"{machine.id}-0"]
    later.terminate(machine.id)
    until(lambda: agents_on(ended) == [])


def test_a_machine_that_never_registers_has_no_agent(ended: Path, redis_server: RedisServer):
    driver = open_driver(ended, redis_server, never_registers_rate=1.0)
    driver.launch(Launch(token="t"))
    assert [machine.state for machine in driver.list()] == [MachineState.starting]
    assert agents_on(ended) == []


def test_a_step_runs_on_a_machine_that_comes_for_it_and_goes_after_it(
    settings: Settings, ended: Path, namespaces: None, tmp_path: Path
):
    settings = Settings(**{**settings.model_dump(), "groups": {GROUP: group()}})
    assert settings.state_dir == ended
    project = write_project(tmp_path / "project", step_yaml("echo hello"))
    with running_service(settings) as service:
        spec = spec_of(project, "run", service.settings)
        service.client.submit(spec)
        view = ExecutionView.model_validate(service.final(spec.execution_id, timeout=60).data)
        assert (view.status, view.reason) == (ExecutionStatus.complete, None)
        until(lambda: agents_on(ended) == [], seconds=45)
        driver = SimulatedDriver(GROUP, group(), deployment="d", state_dir=ended)
        over = (MachineState.terminating, MachineState.gone)
        until(lambda: all(machine.state in over for machine in driver.list()), seconds=45)
