"""The same agent with the Docker runtime: a job, a stop, and a kill -9 that another agent makes good."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.agent_conductor import Conductor
from tests.support.agent_process import AgentProcess
from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from valohai_agent.protocol import Outcome, OutputStored, StopAcknowledged, Warned

if TYPE_CHECKING:
    import docker

StartAgent = Callable[..., AgentProcess]


@pytest.fixture
def start_agent(
    short_tmp: Path, redis_server: RedisServer, docker_client: docker.DockerClient
) -> Iterator[StartAgent]:
    started: list[AgentProcess] = []

    def start(name: str = "w1") -> AgentProcess:
        agent = AgentProcess(redis_server.unix_url, short_tmp / "work", name=name, runtime="docker")
        started.append(agent)
        return agent

    yield start
    for agent in started:
        agent.stop()


def containers(client: docker.DockerClient, execution_id: str) -> list[str]:
    label: dict[str, str | list[str] | bool] = {"label": f"valohai.execution={execution_id}"}
    return [container.id or "" for container in client.containers.list(all=True, filters=label)]


def ready(conductor: Conductor, execution_id: str) -> None:
    wait_for(
        lambda: ("stdout", "ready") in conductor.live_lines(execution_id),
        seconds=60,
        what=f"`ready` from {execution_id}",
    )


def test_a_container_runs_the_job_and_leaves_nothing(
    conductor: Conductor,
    start_agent: StartAgent,
    docker_client: docker.DockerClient,
    docker_image: str,
) -> None:
    agent = start_agent()
    execution_id = conductor.submit(
        "pwd; cat hello.txt; id -u",
        "mkdir -m 700 /valohai/outputs/private; echo x > /valohai/outputs/private/x.txt",
        image=docker_image,
    )
    finished = conductor.finished(execution_id, seconds=60)
    assert (finished.outcome, finished.reason) == (Outcome.complete, None)
    assert conductor.stored_log(execution_id, "stdout") == b"/valohai/repository\nhello\n0\n"
    assert "started container" in conductor.stored_log(execution_id, "stderr").decode()
    names = [body.name for body in conductor.applied(execution_id).bodies(OutputStored)]
    assert names == ["private/x.txt"]
    assert containers(docker_client, execution_id) == []
    wait_for(
        lambda: not (agent.work_dir / execution_id / "1" / "outputs").exists(), what="clean-up"
    )


def test_o16_links_into_the_containers_own_layer_are_stored_with_their_content(
    conductor: Conductor,
    start_agent: StartAgent,
    docker_client: docker.DockerClient,
    docker_image: str,
) -> None:
    """Never a file of the host: the same path there has another content."""
    agent = start_agent()
    host_file = agent.work_dir / "host-file"
    host_file.write_text("of the host")
    execution_id = conductor.submit(
        "mkdir -p /opt/m; echo weights > /opt/m/w.bin; ln -s m /opt/current; ln -s current/w.bin /opt/latest",
        "cd /valohai/outputs; ln -s /opt/m/w.bin w.bin; ln -s /opt/current/w.bin through; ln -s /opt/latest l",
        "ln -s /valohai/repository/hello.txt own; ln -s /opt/none broken; ln -s /dev/null device; ln -s /opt dir",
        "ln -s /opt/loop /opt/loop; ln -s /opt/loop loop; mkfifo /opt/pipe; ln -s /opt/pipe pipe",
        f"ln -s {host_file} host; ln -s /proc/1/environ process",
        "head -c 300000000 /dev/zero > /opt/big; ln -s /opt/big big",
        image=docker_image,
    )
    finished = conductor.finished(execution_id, seconds=90)
    assert (finished.outcome, finished.reason) == (Outcome.complete, None)
    stored = conductor.applied(execution_id).bodies(OutputStored)
    small = {b.name: (conductor.store / b.upload_id).read_bytes() for b in stored if b.size < 1000}
    weights = dict.fromkeys(("w.bin", "through", "l"), b"weights\n")
    assert small == {**weights, "own": b"hello\n"}
    assert {b.name: b.size for b in stored if b.size > 1000} == {"big": 300_000_000}
    warnings = {body.message for body in conductor.applied(execution_id).bodies(Warned)}
    for name, target in {
        "broken": "/opt/none",
        "device": "/dev/null",
        "dir": "/opt",
        "loop": "/opt/loop",
        "pipe": "/opt/pipe",
        "host": str(host_file),
        "process": "/proc/1/environ",
    }.items():
        assert any(f"Output {name!r} is a link to {target!r}, " in w for w in warnings), warnings
    assert containers(docker_client, execution_id) == []


def test_k54_a_stop_interrupts_the_command_in_its_container(
    conductor: Conductor, start_agent: StartAgent, docker_image: str
) -> None:
    start_agent()
    script = "import time\nprint('ready')\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('interrupted')"
    execution_id = conductor.submit(f'python3 -u -c "{script}"', image=docker_image)
    ready(conductor, execution_id)
    conductor.command("w1", kind="stop", execution_id=execution_id)
    finished = conductor.finished(execution_id, seconds=60)
    assert finished.outcome is Outcome.stopped
    assert conductor.stored_log(execution_id, "stdout") == b"ready\ninterrupted\n"
    assert [b.signal for b in conductor.applied(execution_id).bodies(StopAcknowledged)] == [
        "SIGINT"
    ]


def test_kill_9_of_the_agent_ends_its_container_before_the_next_attempt(
    conductor: Conductor,
    start_agent: StartAgent,
    docker_client: docker.DockerClient,
    docker_image: str,
) -> None:
    first = start_agent()
    job = conductor.job('[ "$GO" = yes ] && exit 0; echo ready; sleep 600', image=docker_image)
    conductor.enqueue(job)
    ready(conductor, job.execution_id)
    old = containers(docker_client, job.execution_id)
    first.send(signal.SIGKILL)
    first.wait()
    assert containers(docker_client, job.execution_id) == old, "the container outlives its agent"
    start_agent("w2")
    conductor.requeue(job.model_copy(update={"environment_variables": {"GO": "yes"}}), 2)
    assert conductor.finished(job.execution_id, 2, seconds=60).outcome is Outcome.complete
    assert containers(docker_client, job.execution_id) == []


def test_an_image_that_cannot_be_pulled_is_said_in_words(
    conductor: Conductor, start_agent: StartAgent
) -> None:
    start_agent()
    execution_id = conductor.submit("true", image="registry.invalid/no/such:image")
    finished = conductor.finished(execution_id, seconds=120)
    assert (finished.outcome, finished.exit_code) == (Outcome.error, None)
    assert "registry.invalid/no/such:image" in (finished.reason or "")
