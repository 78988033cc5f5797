"""The container runtime on Podman's socket, where Podman differs from Docker.

The whole contract suite runs there too: DOCKER_HOST=unix:///... pytest tests/contract/agent -k docker
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import demand
from tests.support.podman import IMAGE, PodmanService, missing_programs
from tests.support.ports import wait_for
from valohai_agent.runtimes.base import Running, RunSpec
from valohai_agent.runtimes.docker import DockerRuntime
from valohai_agent.workspace import Workspace


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodmanService]:
    if missing := missing_programs():
        demand.missing("podman", f"not installed: {', '.join(missing)}")
    directory = Path(tempfile.mkdtemp(prefix="vtp-", dir="/tmp"))
    service = PodmanService(directory)
    yield service
    service.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def runtime(service: PodmanService) -> Iterator[DockerRuntime]:
    import docker

    client = docker.DockerClient(base_url=service.host)
    yield DockerRuntime(client)
    client.close()


class Rig:
    def __init__(self, runtime: DockerRuntime, work_dir: Path) -> None:
        self.runtime = runtime
        self.workspace = Workspace.create(work_dir, str(uuid.uuid4()), 1, "w")
        self.output = {"stdout": b"", "stderr": b""}

    def start(self, *commands: str) -> Running:
        spec = RunSpec(workspace=self.workspace, image=IMAGE, commands=commands, environment={})
        return self.runtime.start(spec, self._take)

    def _take(self, stream: str, data: bytes) -> None:
        self.output[stream] += data


@pytest.fixture
def rig(runtime: DockerRuntime, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(runtime, tmp_path)
    yield rig
    runtime.remove_leftovers(rig.workspace.execution_id)
    rig.workspace.remove(remove_tree=runtime.remove_tree)


def test_output_exit_code_and_outputs_arrive_and_nothing_else(rig: Rig) -> None:
    running = rig.start("seq 1 2000; echo fine >&2; echo made > /valohai/outputs/made; exit 7")
    status = running.wait(60)
    assert status is not None
    assert status.code == 7
    assert rig.output["stdout"].split() == [b"%d" % number for number in range(1, 2001)]
    assert rig.output["stderr"] == b"fine\n"
    assert (rig.workspace.outputs / "made").read_text() == "made\n"
    running.signal("SIGTERM")  # after the end: nothing to do, nothing to complain about
    running.remove()


def test_a_command_that_closes_its_output_is_waited_for(rig: Rig) -> None:
    running = rig.start("exec >/dev/null 2>&1; sleep 3; exit 5")
    status = running.wait(60)
    assert status is not None
    assert status.code == 5
    assert rig.output == {"stdout": b"", "stderr": b""}


def test_k54_sigterm_reaches_the_whole_group(rig: Rig) -> None:
    running = rig.start("trap 'echo stopped; exit 9' TERM; echo ready; sleep 600 & wait")
    wait_for(lambda: b"ready" in rig.output["stdout"], seconds=60, what="ready")
    running.signal("SIGTERM")
    status = running.wait(30)
    assert status is not None
    assert status.code == 9
    assert rig.output["stdout"] == b"ready\nstopped\n"


def test_containers_of_a_dead_agent_are_found_and_removed(rig: Rig) -> None:
    running = rig.start("echo ready; sleep 600")
    wait_for(lambda: b"ready" in rig.output["stdout"], seconds=60, what="ready")
    assert rig.runtime.remove_leftovers(rig.workspace.execution_id) == 1
    assert running.wait(30) is not None
