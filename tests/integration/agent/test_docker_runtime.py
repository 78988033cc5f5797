"""What only containers have: images, memory limits, users, leftovers."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.ports import free_port
from valohai_agent.errors import ImageError, RuntimeUnavailable, StartError
from valohai_agent.local_api import LocalApi
from valohai_agent.protocol import Grants
from valohai_agent.runtimes.base import ExitStatus, RunSpec
from valohai_agent.runtimes.docker import DockerRuntime
from valohai_agent.workspace import Workspace

if TYPE_CHECKING:
    from docker import DockerClient

TINY = "valohai-dagster-test-tiny:1"


@pytest.fixture(scope="session")
def tiny_image(docker_client: DockerClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with a static busybox alone: sh and no bash."""
    busybox = shutil.which("busybox") or "/bin/busybox"
    if not Path(busybox).exists():
        pytest.skip("elsewhere: the package busybox-static is not installed")
    directory = tmp_path_factory.mktemp("tiny")
    shutil.copy(busybox, directory / "busybox")
    (directory / "Dockerfile").write_text(
        'FROM scratch\nCOPY busybox /bin/busybox\nRUN ["/bin/busybox", "--install", "-s", "/bin"]\n'
        'USER 1000\nENTRYPOINT ["/bin/false"]\n'
    )
    docker_client.images.build(path=str(directory), tag=TINY, rm=True, forcerm=True)
    return TINY


class Rig:
    def __init__(self, client: DockerClient, work_dir: Path) -> None:
        self.runtime = DockerRuntime(client)
        self.work_dir = work_dir
        self.output = {"stdout": b"", "stderr": b""}
        self.workspace = Workspace.create(work_dir, str(uuid.uuid4()), 1, "w")

    def spec(self, image: str, *commands: str, **options) -> RunSpec:
        return RunSpec(workspace=self.workspace, image=image, commands=commands, **options)

    def run(self, image: str, *commands: str, **options) -> ExitStatus:
        running = self.runtime.start(self.spec(image, *commands, **options), self._take)
        try:
            status = running.wait(60)
            assert status is not None
            self.usage = running.usage()
            return status
        finally:
            running.remove()

    def _take(self, stream: str, data: bytes) -> None:
        self.output[stream] += data


@pytest.fixture
def rig(docker_client: DockerClient, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(docker_client, tmp_path)
    yield rig
    rig.workspace.remove(remove_tree=rig.runtime.remove_tree)


def test_c23_an_image_without_bash_runs_sh(rig: Rig, tiny_image: str) -> None:
    assert rig.run(tiny_image, "export A=1", 'test "$A" = 1 && echo ok').code == 0
    assert rig.output["stdout"] == b"ok\n"


def test_k50_k52_root_and_no_entrypoint_whatever_the_image_says(rig: Rig, tiny_image: str) -> None:
    assert rig.run(tiny_image, "id -u").code == 0
    assert rig.output["stdout"] == b"0\n"


def test_k51_the_images_user_on_request_can_write_its_outputs(rig: Rig, tiny_image: str) -> None:
    status = rig.run(
        tiny_image, "id -u; echo x > /valohai/outputs/x; echo x > y", respect_image_user=True
    )
    assert status.code == 0, rig.output
    assert rig.output["stdout"] == b"1000\n"


def test_v23_sh_too_waits_for_a_program_that_handles_the_interruption(
    rig: Rig, docker_image: str
) -> None:
    script = "import time\nprint('ready', flush=True)\ntry:\n  time.sleep(60)\n"
    script += "except KeyboardInterrupt:\n  time.sleep(.5); print('cleaned up')\n"
    running = rig.runtime.start(
        rig.spec(docker_image, f"#!/bin/sh\ntrap 'exit 130' INT\npython3 -c \"{script}\"\ntrue"),
        rig._take,
    )
    while b"ready" not in rig.output["stdout"]:
        assert running.wait(0.05) is None
    running.signal("SIGINT")
    status = running.wait(30)
    running.remove()
    assert status == ExitStatus(code=130)
    assert rig.output["stdout"].endswith(b"cleaned up\n")


def test_c29_running_out_of_memory_is_said_with_the_limit(rig: Rig, docker_image: str) -> None:
    status = rig.run(
        docker_image,
        "python3 -c 'x = bytearray(500_000_000)'",
        environment={"VH_MEMORY_LIMIT": "64m"},
    )
    assert status.code == 137
    assert status.oom_killed
    assert "ran out of memory (limit 67.1 MB)" in (status.message or "")
    assert rig.usage.oom_killed


def test_k23_k25_cores_shared_memory_and_ports_reach_the_container(
    rig: Rig, tiny_image: str, docker_client: DockerClient
) -> None:
    port = free_port()
    limits = {"VH_CPU_LIMIT": "1.5", "VH_SHM_SIZE": "32m", "VH_EXPOSE_PORTS": f"{port}:80"}
    running = rig.runtime.start(rig.spec(tiny_image, "sleep 60", environment=limits), rig._take)
    try:
        attributes = docker_client.containers.get(running.id).attrs
        assert attributes["HostConfig"]["NanoCpus"] == 1_500_000_000
        assert attributes["HostConfig"]["ShmSize"] == 32 * 2**20
        assert attributes["NetworkSettings"]["Ports"]["80/tcp"][0]["HostPort"] == str(port)
    finally:
        running.remove()


def test_an_image_that_cannot_be_pulled_is_named_with_the_next_step(rig: Rig) -> None:
    with pytest.raises(ImageError) as caught:
        rig.runtime.pull("127.0.0.1:1/no/such:image")
    message = str(caught.value)
    assert "'127.0.0.1:1/no/such:image' cannot be pulled" in message
    assert "credentials" in message


def test_an_image_name_that_is_no_name_is_an_image_error(rig: Rig) -> None:
    with pytest.raises(ImageError, match="UPPER:bad:tag"):
        rig.runtime.pull("UPPER:bad:tag")


def test_an_image_that_is_here_is_not_pulled_unless_forced(rig: Rig, tiny_image: str) -> None:
    rig.runtime.pull(tiny_image)
    with pytest.raises(ImageError, match="a fresh pull was asked for"):
        rig.runtime.pull(tiny_image, force=True)


def test_a_missing_interpreter_is_command_not_found(rig: Rig, tiny_image: str) -> None:
    status = rig.run(tiny_image, "#!/usr/bin/env python3\nprint(1)")
    assert status.code == 127
    assert "not found" in (status.message or "")


@pytest.mark.parametrize(
    ("environment", "words"),
    [({"VH_MEMORY_LIMIT": "lots"}, "VH_MEMORY_LIMIT"), ({"VH_DOCKER_NETWORK": "nope"}, "nope")],
)
def test_a_container_that_cannot_be_started_says_why_and_leaves_nothing(
    rig: Rig, tiny_image: str, environment: dict[str, str], words: str
) -> None:
    with pytest.raises(StartError, match=words):
        rig.run(tiny_image, "true", environment=environment)
    assert rig.runtime.remove_leftovers(rig.workspace.execution_id) == 0


def test_an_earlier_attempts_container_is_removed_before_the_next(
    rig: Rig, tiny_image: str
) -> None:
    running = rig.runtime.start(rig.spec(tiny_image, "sleep 300"), rig._take)
    assert rig.runtime.remove_leftovers(rig.workspace.execution_id, 2) == 0
    assert rig.runtime.remove_leftovers(rig.workspace.execution_id) == 1
    status = running.wait(30)
    assert status is not None
    assert status.code == 137


def test_files_of_the_containers_root_are_opened_and_removed_by_a_helper_container(
    rig: Rig, tiny_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.run(tiny_image, "mkdir -m 0700 /valohai/outputs/p; echo x > /valohai/outputs/p/.f")
    outputs = rig.workspace.outputs
    monkeypatch.setattr("valohai_agent.runtimes.docker.first_unreadable", lambda path: path)
    rig.runtime.make_readable(outputs)
    assert (outputs / "p").stat().st_mode & 0o055 == 0o055
    rig.runtime._as_root(outputs, 'rm -rf -- "$1"/* "$1"/.[!.]* "$1"/..?*')
    assert os.listdir(outputs) == []


def test_k38_the_command_reaches_the_local_api(rig: Rig, docker_image: str) -> None:
    details: list[str] = []
    bind_host, public_host = rig.runtime.api_hosts({})
    with LocalApi(
        bind_host=bind_host,
        public_host=public_host,
        inputs=[],
        on_status_detail=details.append,
        input_grants=lambda ids: Grants(),
    ) as api:
        entry = api.endpoints()["set_status_detail"]
        code = (
            "import json, sys, urllib.request as u; e = json.loads(sys.argv[1]); "
            "u.urlopen(u.Request(e['url'], b'{\"status_detail\": \"half\"}', e['headers']))"
        )
        command = shlex.join(["python3", "-c", code, json.dumps(entry)])
        assert rig.run(docker_image, command).code == 0, rig.output
    assert details == ["half"]


def test_no_daemon_is_said_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    reason = DockerRuntime().available() or ""
    assert "unix:///nonexistent/docker.sock" in reason
    from valohai_agent.runtimes import select_runtime

    with pytest.raises(RuntimeUnavailable, match="no Docker daemon"):
        select_runtime("docker", work_dir=Path("/nonexistent"))


def test_auto_falls_back_to_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from valohai_agent.runtimes import select_runtime
    from valohai_agent.runtimes.venvs import Venvs

    monkeypatch.setattr(Venvs, "warm_up", lambda self, count: None)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    assert select_runtime("auto", work_dir=tmp_path).name == "process"
    with pytest.raises(RuntimeUnavailable, match="no runtime 'vm'"):
        select_runtime("vm", work_dir=tmp_path)
