"""The embedded default with real processes: two terminals at once, idle exit, and a conductor that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.deployment import Deployment, follow
from tests.support.ports import wait_for
from tests.support.projects import spec_of, step_yaml, write_project
from valohai_dagster.capacity.clouds.local import living_agents
from valohai_dagster.embedded.conductor import (
    conductor_lock,
    ensure_conductor,
    log_path,
    other_settings,
    running_conductor,
)
from valohai_dagster.embedded.redis import EmbeddedRedis
from valohai_dagster.embedded.settings_in_use import file_stamp
from valohai_dagster.errors import ServiceUnavailable
from valohai_dagster.executions.stream import ExecutionStatus
from valohai_dagster.settings import Settings

TERMINALS = 3
# Waits for a common moment, opens a client, and tells whom it met.
TERMINAL = """
import json, sys, time
from valohai_dagster.executions.client import ExecutionClient
from valohai_dagster.embedded.conductor import running_conductor
time.sleep(max(0.0, float(sys.argv[1]) - time.time()))
client = ExecutionClient.open()
conductor = running_conductor(client.settings)
redis = client._redis.info("server")
print(json.dumps([conductor.pid, redis["process_id"], client.records.deployment_id]))
"""


@pytest.fixture
def deployment(tmp_path: Path, namespaces: None) -> Iterator[Deployment]:
    toml = """
    http_port = 0
    idle_exit_seconds = 60
    [groups.local]
    runtime = "process"
    slots = 2
    scale_down_grace_seconds = 1
    """
    with Deployment(tmp_path / "deployment", toml) as deployment:
        yield deployment
        deployment.down()


def with_setting(deployment: Deployment, line: str) -> None:
    """Replaces one setting at the top of the file."""
    name = line.split("=")[0].strip()
    lines = deployment.config.read_text().splitlines()
    kept = [text for text in lines if not text.strip().startswith(name)]
    deployment.config.write_text("\n".join([line, *kept]))


def terminals(deployment: Deployment, at: float) -> list[list[object]]:
    environment = {**os.environ, "VALOHAI_CONFIG": str(deployment.config)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TERMINAL, str(at)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(TERMINALS)
    ]
    answers = [process.communicate(timeout=90) for process in started]
    assert [p.returncode for p in started] == [0] * TERMINALS, answers
    return [json.loads(out) for out, _ in answers]


@pytest.mark.parametrize("attempt", range(2))
def test_terminals_that_start_at_once_share_one_redis_and_one_conductor(
    deployment: Deployment, attempt: int
) -> None:
    met = terminals(deployment, time.time() + 2.0)
    assert met == [met[0]] * TERMINALS
    log = log_path(deployment.settings).read_text()
    assert log.count("serving at") == 1
    assert "Traceback" not in log


def test_everything_ends_when_idle_and_starts_again_with_the_next_command(
    deployment: Deployment, tmp_path: Path
) -> None:
    with_setting(deployment, "idle_exit_seconds = 2")
    project = write_project(tmp_path / "project", step_yaml("echo hello"))
    view, _ = deployment.execute(project)
    assert view.status is ExecutionStatus.complete
    first = running_conductor(deployment.settings)
    assert first is not None
    deployment.disconnect()
    state = deployment.settings.state_dir
    server = EmbeddedRedis(deployment.settings)
    wait_for(lambda: not server.running(), seconds=40, every=0.2, what="Redis to end")
    wait_for(lambda: not living_agents(state), what="the agents to end")
    assert running_conductor(deployment.settings) is None
    view, _ = deployment.execute(project)
    assert (view.status, view.counter) == (ExecutionStatus.complete, 2)
    second = running_conductor(deployment.settings)
    assert second is not None
    assert second.pid != first.pid


def test_a_client_that_was_open_all_the_time_finds_the_next_conductor(
    deployment: Deployment, tmp_path: Path
) -> None:
    with_setting(deployment, "idle_exit_seconds = 2")
    project = write_project(tmp_path / "project", step_yaml("echo hello"))
    client = deployment.client()
    first = running_conductor(deployment.settings)
    assert first is not None
    wait_for(
        lambda: running_conductor(deployment.settings) is None,
        seconds=30,
        every=0.2,
        what="the conductor to end",
    )
    began = time.monotonic()
    spec = spec_of(project, "run", deployment.settings)
    client.submit(spec)
    view, _ = follow(client, spec.execution_id)
    assert view.status is ExecutionStatus.complete
    assert time.monotonic() - began < 25


def test_a_conductor_that_is_killed_is_replaced_and_the_execution_goes_on(
    deployment: Deployment, tmp_path: Path
) -> None:
    marker = tmp_path / "go-on"
    command = f"echo first; while [ ! -e {marker} ]; do sleep 0.1; done; echo second"
    client = deployment.client()
    spec = spec_of(
        write_project(tmp_path / "project", step_yaml(command)), "run", deployment.settings
    )
    client.submit(spec)
    messages: list[str] = []
    killed = None
    deadline = time.monotonic() + 90
    for event in client.follow(spec.execution_id):
        assert time.monotonic() < deadline, messages
        if event is None:
            info = running_conductor(deployment.settings)
            if killed is not None and info is not None and info.pid != killed:
                marker.touch()  # only now may the command end
            continue
        messages.append(event.message)
        if event.message == "running" and killed is None:
            info = running_conductor(deployment.settings)
            assert info is not None
            os.kill(info.pid, signal.SIGKILL)
            killed = info.pid
    view = client.view(spec.execution_id)
    assert view is not None
    assert (view.status, view.attempt) == (ExecutionStatus.complete, 1)
    assert log_path(deployment.settings).read_text().count("serving at") == 2
    assert ensure_conductor(deployment.settings) is not None


def test_a_conductor_is_started_when_the_one_that_is_about_to_end_lets_go(
    deployment: Deployment,
) -> None:
    """The lock is held, but nobody serves: what is spawned meanwhile ends at once, and is not the last try."""
    ending = threading.Event()

    def hold() -> None:
        with conductor_lock(deployment.settings) as mine:
            assert mine
            ending.wait(3)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert ensure_conductor(deployment.settings) is not None
    finally:
        ending.set()
        thread.join()


def test_a_conductor_that_cannot_start_is_told_in_its_own_words_and_no_earlier_ones(
    tmp_path: Path,
) -> None:
    file = tmp_path / "valohai.toml"
    file.write_text("http_port = 'many'")
    settings = Settings(state_dir=tmp_path / "state", config_file=file)
    settings.state_dir.mkdir()
    log_path(settings).write_text("what an earlier one said\n")
    with pytest.raises(ServiceUnavailable, match="ended as soon as it was started") as told:
        ensure_conductor(settings)
    assert "http_port" in str(told.value)
    assert "an earlier one" not in str(told.value)


def test_a_conductor_that_has_nothing_to_do_takes_a_changed_file_over(
    deployment: Deployment,
) -> None:
    deployment.client()
    first = running_conductor(deployment.settings)
    assert first is not None
    deployment.disconnect()
    with_setting(deployment, "idle_exit_seconds = 61")
    deployment.client()
    second = running_conductor(deployment.settings)
    assert second is not None
    assert second.pid != first.pid
    assert other_settings(deployment.settings, second) == []


def test_settings_that_change_while_something_runs_are_named_and_wait(
    deployment: Deployment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    marker = tmp_path / "go-on"
    project = write_project(
        tmp_path / "project", step_yaml(f"while [ ! -e {marker} ]; do sleep 0.1; done")
    )
    client = deployment.client()
    spec = spec_of(project, "run", deployment.settings)
    client.submit(spec)
    first = running_conductor(deployment.settings)
    assert first is not None
    wait_for(lambda: client.view(spec.execution_id) is not None, what="the execution")
    with_setting(deployment, "owner = 'hunter2'")
    for _ in range(2):
        deployment.client()
    (record,) = [one for one in caplog.records if "other settings" in one.getMessage()]
    assert "than these: owner. It takes over" in record.getMessage()
    assert "hunter2" not in record.getMessage()
    assert running_conductor(deployment.settings) is not None
    marker.touch()
    view, _ = follow(client, spec.execution_id)
    assert (view.status, view.attempt) == (ExecutionStatus.complete, 1)

    def taken_over() -> bool:
        info = running_conductor(deployment.settings)
        return info is not None and not other_settings(deployment.settings, info)

    wait_for(taken_over, seconds=40, every=0.2, what="a conductor with the new settings")
    assert "hunter2" not in log_path(deployment.settings).read_text()


def test_a_broken_file_changes_nothing(deployment: Deployment) -> None:
    deployment.client()
    first = running_conductor(deployment.settings)
    assert first is not None
    settings, text = deployment.settings, deployment.config.read_text()
    deployment.config.write_text("http_port = \n")
    log = log_path(settings)
    wait_for(lambda: "the settings stay as they were" in log.read_text(), what="its words")
    deployment.config.write_text(text)
    known = replace(first, stamp=file_stamp(deployment.config))
    wait_for(lambda: running_conductor(settings) == known, what="the same conductor to look again")
