"""What every runtime promises a job: one suite, containers and plain processes."""

from __future__ import annotations

import os
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from valohai_agent.config_files import HostFacts, build_environment
from valohai_agent.protocol import Job
from valohai_agent.runtimes.base import ExitStatus, Running, RunSpec, Runtime
from valohai_agent.runtimes.docker import DockerRuntime
from valohai_agent.runtimes.process import ProcessRuntime
from valohai_agent.workspace import Workspace, reap_leftovers

SECONDS = 60


@dataclass
class Rig:
    runtime: Runtime
    image: str
    work_dir: Path
    outputs: dict[str, bytes] = field(default_factory=lambda: {"stdout": b"", "stderr": b""})
    running: list[Running] = field(default_factory=list)
    workspaces: list[Workspace] = field(default_factory=list)

    def job(self, *commands: str, **fields: Any) -> Job:
        return Job(
            execution_id=str(uuid.uuid4()),
            group="g",
            project_id="p",
            project_name="o/p",
            step="s",
            commit="c",
            archive_sha256="",
            image=self.image,
            commands=list(commands),
            **fields,
        )

    def start(self, *commands: str, environment: dict[str, str] | None = None, **options: Any):
        job = self.job(*commands, environment_variables=environment or {})
        workspace = Workspace.create(self.work_dir, job.execution_id, 1, "w")
        self.workspaces.append(workspace)
        prepare = options.pop("prepare", lambda workspace: None)
        prepare(workspace)
        values = build_environment(
            job,
            secrets={},
            valohai_dir=self.runtime.valohai_dir(workspace),
            facts=HostFacts(local_ip="10.0.0.1"),
        )
        spec = RunSpec(
            workspace=workspace,
            image=self.image,
            commands=job.commands,
            environment=values,
            **options,
        )
        running = self.runtime.start(spec, self._take)
        self.running.append(running)
        return running

    def run(self, *commands: str, **options: Any) -> ExitStatus:
        status = self.start(*commands, **options).wait(SECONDS)
        assert status is not None, "still running"
        return status

    def wait_for(self, text: bytes, stream: str = "stdout") -> None:
        deadline = time.monotonic() + SECONDS
        while text not in self.outputs[stream]:
            assert time.monotonic() < deadline, self.outputs
            threading.Event().wait(0.02)

    def out(self) -> str:
        return self.outputs["stdout"].decode()

    def _take(self, stream: str, data: bytes) -> None:
        self.outputs[stream] += data


@pytest.fixture(params=["docker", "process", "process-without-namespace"])
def runtime_name(request: pytest.FixtureRequest) -> str:
    if request.param == "docker":
        request.getfixturevalue("docker_client")
    if request.param == "process":
        request.getfixturevalue("namespaces")
    return request.param


@pytest.fixture
def rig(runtime_name: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    image, runtime = "python:3.11", None
    if runtime_name == "docker":
        client = request.getfixturevalue("docker_client")
        image = request.getfixturevalue("docker_image")
        runtime = DockerRuntime(client)
    elif runtime_name == "process":
        runtime = ProcessRuntime(tmp_path)
    else:
        runtime = ProcessRuntime(tmp_path, without_namespace="turned off for the test")
    rig = Rig(runtime, image, tmp_path / "work")
    yield rig
    for running in rig.running:
        running.remove()
    for workspace in rig.workspaces:
        workspace.remove(remove_tree=runtime.remove_tree)


@pytest.fixture
def with_valohai(rig: Rig, runtime_name: str) -> Rig:
    if runtime_name == "process-without-namespace":
        pytest.skip("elsewhere: this runtime has no /valohai")
    return rig


def test_it_is_available_here(rig: Rig) -> None:
    assert rig.runtime.available() is None


def test_c25_c26_the_command_runs_in_the_repository_with_empty_input(rig: Rig) -> None:
    status = rig.run('test "$(pwd)" = "$VH_REPOSITORY_DIR" && cat && ! tty && echo fine >&2')
    assert status == ExitStatus(code=0)
    assert rig.outputs["stderr"] == b"fine\n"


def test_v02_c20_the_last_exit_code_is_the_status(rig: Rig) -> None:
    assert rig.run("true", "exit 3") == ExitStatus(code=3)


def test_c23_items_share_one_bash(rig: Rig) -> None:
    status = rig.run("source /dev/null", "export A='x y'", 'echo "$A"', "a=(1 2); echo ${a[1]}")
    assert (status.code, rig.out()) == (0, "x y\n2\n")


def test_v05_c24_a_python_shebang_runs_python(rig: Rig) -> None:
    status = rig.run("#!/usr/bin/env python3\nprint('from', 'python')")
    assert (status.code, rig.out()) == (0, "from python\n")


def test_k01_k10_directories_and_variables(rig: Rig) -> None:
    status = rig.run(
        'ls -d "$VH_CONFIG_DIR" "$VH_INPUTS_DIR" "$VH_OUTPUTS_DIR" "$VH_REPOSITORY_DIR" >/dev/null',
        'test "$VH_JOB_ID" = "exec-$VH_EXECUTION_ID" && test "$VH_PROJECT_ID" = p',
    )
    assert status.code == 0, rig.outputs


def test_c28_python_output_is_not_buffered(rig: Rig) -> None:
    rig.start("#!/usr/bin/env python3\nimport time\nprint('now')\ntime.sleep(60)")
    rig.wait_for(b"now\n")


def test_k03_inputs_and_config_are_read_only_at_valohai(with_valohai: Rig) -> None:
    status = with_valohai.run(
        "! touch /valohai/inputs/x",
        "test $? = 0 && ! touch /valohai/config/x",
        "test $? = 0 && touch /valohai/outputs/x /valohai/repository/x",
    )
    assert status.code == 0, with_valohai.outputs


def test_i36_on_demand_inputs_can_be_written(with_valohai: Rig) -> None:
    status = with_valohai.run(
        "touch /valohai/inputs/lazy/file && ! touch /valohai/inputs/file",
        writable_inputs=["lazy"],
        prepare=lambda workspace: (workspace.inputs / "lazy").mkdir(),
    )
    assert status.code == 0, with_valohai.outputs


def test_outputs_of_the_command_are_in_the_workspace(rig: Rig) -> None:
    rig.run('printf data > "$VH_OUTPUTS_DIR/a"')
    assert (rig.workspaces[0].outputs / "a").read_bytes() == b"data"


def test_no_byte_of_fast_output_is_lost(rig: Rig) -> None:
    status = rig.run("seq 1 100000", "printf 'no newline' >&2")
    assert status.code == 0
    assert rig.out() == "".join(f"{n}\n" for n in range(1, 100001))
    assert rig.outputs["stderr"] == b"no newline"


def test_command_not_found_is_said_and_where_to_look(rig: Rig) -> None:
    status = rig.run("nosuchcommand --now")
    assert status.code == 127
    assert "not found" in (status.message or "")
    advises_image = "that the image has it" in (status.message or "")
    assert advises_image is rig.runtime.uses_images
    assert b"nosuchcommand" in rig.outputs["stderr"]


def test_c29_a_signal_counts_as_128_and_its_number(rig: Rig) -> None:
    status = rig.run("#!/usr/bin/env python3\nimport os\nos.kill(os.getpid(), 11)")
    assert status.code == 139
    assert "SIGSEGV" in (status.message or "")


INTERRUPTIBLE = """python3 -c '
import time
print("ready")
try:
    while True: time.sleep(1)
except KeyboardInterrupt:
    time.sleep(0.5)
    print("cleaned up")
'"""


def test_v23_k53_sigint_reaches_python_and_its_handler_may_finish(rig: Rig) -> None:
    running = rig.start("echo first", INTERRUPTIBLE, "echo never")
    rig.wait_for(b"ready")
    running.signal("SIGINT")
    status = running.wait(SECONDS)
    assert status == ExitStatus(code=130)
    assert rig.out() == "first\nready\ncleaned up\n"


def test_k54_sigterm_reaches_the_whole_group(rig: Rig) -> None:
    running = rig.start("trap - TERM", "sleep 300 & echo ready", "sleep 300 | sleep 300")
    rig.wait_for(b"ready")
    running.signal("SIGTERM")
    assert running.wait(SECONDS) is not None


def test_k54_sigkill_ends_what_ignores_everything(rig: Rig) -> None:
    running = rig.start("trap '' INT TERM", "echo ready", "while :; do sleep 1; done")
    rig.wait_for(b"ready")
    running.signal("SIGINT")
    running.signal("SIGTERM")
    assert running.wait(0.5) is None
    running.signal("SIGKILL")
    status = running.wait(SECONDS)
    assert status is not None
    assert status.code == 137
    assert not status.oom_killed


def test_the_end_of_the_command_ends_what_it_left_behind(rig: Rig) -> None:
    started = time.monotonic()
    status = rig.run("(setsid sleep 300 &) ", "nohup sleep 300 >/dev/null 2>&1 &", "echo done")
    assert status.code == 0
    assert time.monotonic() - started < 30
    assert rig.out() == "done\n"


def test_signalling_and_removing_after_the_end_is_silent(rig: Rig) -> None:
    running = rig.start("true")
    assert running.wait(SECONDS) is not None
    running.signal("SIGINT")
    running.remove()
    running.remove()
    running.signal("SIGKILL")


def test_private_directories_of_user_code_are_collected_and_removed(rig: Rig) -> None:
    rig.run(
        'mkdir -m 0700 "$VH_OUTPUTS_DIR/p"',
        'echo x > "$VH_OUTPUTS_DIR/p/f"; chmod 0 "$VH_OUTPUTS_DIR/p"',
    )
    [workspace] = rig.workspaces
    rig.runtime.make_readable(workspace.outputs)
    assert (workspace.outputs / "p/f").read_text() == "x\n"
    rig.running[0].remove()
    workspace.remove(remove_tree=rig.runtime.remove_tree)
    assert not workspace.root.exists()


def test_leftovers_of_a_dead_agent_are_ended_and_removed_but_for_the_logs(rig: Rig) -> None:
    running = rig.start("echo ready", "(setsid sleep 300 &)", "sleep 300")
    rig.wait_for(b"ready")
    [workspace] = rig.workspaces
    (workspace.logs / "stdout").write_text("ready\n")
    reap: dict[str, Any] = {
        "remove_containers": rig.runtime.remove_leftovers,
        "remove_tree": rig.runtime.remove_tree,
    }
    assert reap_leftovers(rig.work_dir, **reap) == []
    assert running.wait(0) is None
    os.close(workspace._lock_fd)  # what the death of the agent does
    workspace._lock_fd = -1
    [leftover] = reap_leftovers(rig.work_dir, **reap)
    assert (leftover.execution_id, leftover.attempt) == (workspace.execution_id, 1)
    assert running.wait(SECONDS) is not None
    assert (leftover.logs / "stdout").read_text() == "ready\n"
    assert not workspace.outputs.exists()
    assert reap_leftovers(rig.work_dir, **reap) == []
    assert reap_leftovers(rig.work_dir, **reap, now=lambda: time.time() + 10**8) == []
    assert not workspace.root.exists()


def test_usage_is_measured(rig: Rig, runtime_name: str) -> None:
    """M-08"""
    busy = "import time\nx = bytearray(60_000_000)\nend = time.time() + 2\nwhile time.time() < end: pass"
    running = rig.start(f"python3 -c '{busy}'")
    assert running.wait(SECONDS) is not None
    usage = running.usage()
    assert 60_000_000 < (usage.max_memory_bytes or 0) < 500_000_000
    assert 0.1 < (usage.cpu_seconds or 0) < 10
    assert 0.05 < (usage.cpu_cores_average or 0) <= (usage.cpu_cores_peak or 0) < 4
    assert usage.oom_killed is False


def test_k62_a_program_enters_beside_the_command(rig: Rig) -> None:
    running = rig.start("echo here > mark; echo ready; sleep 60", environment={"MINE": "1"})
    rig.wait_for(b"ready")
    entry = running.enter(["/bin/sh", "-c", 'cat mark; echo "$MINE"; cat; exit 5'])
    done = subprocess.run(
        entry.argv, env=dict(entry.environment), input=b"in", capture_output=True, timeout=SECONDS
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, b"here\n1\nin", b"")
