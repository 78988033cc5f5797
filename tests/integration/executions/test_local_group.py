"""The whole chain on one host: service, local group, real agent processes, real commands."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.support.projects import spec_of, step_yaml, write_project
from tests.support.service import RunningService, running_service
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import LocalGroupSettings


@pytest.fixture
def service(settings: Settings, namespaces: None) -> Iterator[RunningService]:
    group = LocalGroupSettings(
        runtime="process", max_agents=1, slots=2, scale_down_grace_seconds=60
    )
    settings = Settings(**{**settings.model_dump(), "groups": {"local": group}})
    with running_service(settings) as service:
        yield service
        for agent in service.service.groups["local"].alive() if service.service else ():
            os.kill(agent.pid, signal.SIGKILL)


def stored_log(service: RunningService, execution_id: str, attempt: int, stream: str) -> str:
    mine = sa.and_(t.attempts.c.execution_id == execution_id, t.attempts.c.number == attempt)
    with service.records.read() as conn:
        log = conn.execute(sa.select(t.attempts.c.logs).where(mine)).scalar_one()[stream]
    assert service.service is not None
    with service.service.stores[log["store"]].open(log["key"]) as file:
        return file.read().decode()


def run(
    service: RunningService, project: Path, step: str = "run", **config: object
) -> ExecutionView:
    spec = spec_of(project, step, service.settings, **config)
    service.client.submit(spec)
    return ExecutionView.model_validate(service.final(spec.execution_id, timeout=90).data)


def test_a_step_runs_on_an_agent_that_was_started_for_it(service: RunningService, tmp_path: Path):
    yaml = step_yaml(
        "echo hello > /valohai/outputs/greeting.txt",
        """echo '{"loss": 0.25}'""",
        "echo from stdout; echo from stderr >&2",
    )
    view = run(service, write_project(tmp_path / "project", yaml))
    assert (view.status, view.reason) == (ExecutionStatus.complete, None)
    assert [o.name for o in view.outputs] == ["greeting.txt"]
    assert view.latest_metadata["loss"] == 0.25
    assert {"preparing", "running", "uploading"} <= {span.phase for span in view.phases}
    assert stored_log(service, view.id, 1, "stdout") == '{"loss": 0.25}\nfrom stdout\n'
    assert "from stderr\n" in stored_log(service, view.id, 1, "stderr")


def test_an_execution_whose_agent_is_killed_finishes_as_attempt_two_and_keeps_the_first_log(
    service: RunningService, tmp_path: Path
):
    marker = tmp_path / "second-time"
    command = f"""
    if [ -e {marker} ]; then echo second; exit 0; fi
    touch {marker}; echo first; sleep 600
    """
    project = write_project(tmp_path / "project", step_yaml(command))
    spec = spec_of(project, "run", service.settings)
    service.client.submit(spec)
    deadline = time.monotonic() + 60
    while not marker.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # the agent reads "first" before it dies
    assert service.service is not None
    (agent,) = service.service.groups["local"].alive()
    os.kill(agent.pid, signal.SIGKILL)
    view = ExecutionView.model_validate(service.final(spec.execution_id, timeout=90).data)
    assert (view.status, view.attempt) == (ExecutionStatus.complete, 2)
    assert stored_log(service, view.id, 1, "stdout") == "first\n"
    assert stored_log(service, view.id, 2, "stdout") == "second\n"
    assert f"worker {agent.name} was lost" in str(view.attempts[0].reason)


def test_v23_a_stop_reaches_the_command_and_its_outputs_are_stored(
    service: RunningService, tmp_path: Path
):
    script = """
    import time
    print("ready", flush=True)
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        open("/valohai/outputs/saved.txt", "w").write("in time")
    """
    project = write_project(tmp_path / "project", step_yaml("python3 work.py"), work__py=script)
    spec = spec_of(project, "run", service.settings)
    service.client.submit(spec)
    service.events(spec.execution_id, lambda e: e.message == "running", timeout=60)
    time.sleep(1.5)
    service.client.stop(spec.execution_id, reason="enough")
    events = service.events(spec.execution_id, lambda e: e.kind is EventKind.final, timeout=60)
    view = ExecutionView.model_validate(events[-1].data)
    assert view.status is ExecutionStatus.stopped
    assert [o.name for o in view.outputs] == ["saved.txt"]
    assert any("SIGINT" in e.message for e in events)


def test_a_service_that_is_restarted_finds_its_running_agents_again(
    service: RunningService, tmp_path: Path
):
    project = write_project(tmp_path / "project", step_yaml("sleep 4; echo done"))
    spec = spec_of(project, "run", service.settings)
    service.client.submit(spec)
    service.events(spec.execution_id, lambda e: e.message == "running", timeout=60)
    service.kill()
    time.sleep(1)
    service.start()
    view = ExecutionView.model_validate(service.final(spec.execution_id, timeout=60).data)
    assert (view.status, view.attempt) == (ExecutionStatus.complete, 1)
    assert service.service is not None
    assert len(service.service.groups["local"].alive()) == 1
