"""Processes of the process runtime that wait to become a job's command."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.ports import wait_for
from valohai_agent.runtimes import namespace
from valohai_agent.runtimes.entries import Entries

pytestmark = pytest.mark.usefixtures("namespaces")

KEPT_BY_LIBC = (
    0b11 << 31
)  # signals 32 and 33: how whoever started the tests has set them is out of reach


def spec(tmp_path: Path, command: str, **environment: str) -> dict[str, Any]:
    argv = ["/bin/sh", "-c", command]
    return namespace.entry_spec(tmp_path, [], argv, cwd="/tmp", environment=environment)


def waiting(entries: Entries) -> int:
    return entries._spare[0].process.pid


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def output(process: subprocess.Popen[bytes]) -> str:
    out, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, b"")
    return out.decode()


def test_the_waiting_process_becomes_the_command(tmp_path: Path) -> None:
    entries = Entries()
    entries.warm_up()
    pid = waiting(entries)
    process = entries.start(spec(tmp_path, "pwd; env; readlink /proc/self/fd/0", A="1\n2", B="ü"))
    assert process.pid == pid
    lines = output(process).splitlines()
    assert lines[0] == "/tmp"
    assert lines[-1] == "/dev/null"
    assert sorted(lines[1:-1]) == ["2", "A=1", "B=ü", "PWD=/tmp"]
    assert entries._spare == []


def test_each_command_has_a_process_of_its_own(tmp_path: Path) -> None:
    entries = Entries()
    entries.warm_up()
    entries.warm_up()
    assert len(entries._spare) == 1
    first = entries.start(spec(tmp_path, "echo one"))
    second = entries.start(spec(tmp_path, "echo two"))
    assert (output(first), output(second)) == ("one\n", "two\n")


def test_the_command_gets_no_descriptor_and_no_ignored_signal_of_ours(tmp_path: Path) -> None:
    entries = Entries()
    entries.warm_up()
    command = "ls /proc/self/fd | wc -l; grep SigIgn /proc/self/status"
    descriptors, ignored = output(entries.start(spec(tmp_path, command))).splitlines()
    assert int(descriptors) == 4  # the standard ones, and the directory that ls reads
    assert int(ignored.split()[1], 16) & ~KEPT_BY_LIBC == 0


def test_a_waiting_process_that_died_is_replaced(tmp_path: Path) -> None:
    entries = Entries()
    entries.warm_up()
    os.kill(waiting(entries), signal.SIGKILL)
    wait_for(lambda: entries._spare[0].process.poll() is not None, what="its end")
    assert output(entries.start(spec(tmp_path, "echo here"))) == "here\n"


def test_it_ends_with_whoever_started_it() -> None:
    entries = Entries()
    entries.warm_up()
    pid = waiting(entries)
    del entries
    gc.collect()
    assert gone(pid)


def test_it_ends_when_its_agent_is_killed() -> None:
    code = (
        "import time\nfrom valohai_agent.runtimes.entries import Entries\n"
        "e = Entries(); e.warm_up(); print(e._spare[0].process.pid, flush=True); time.sleep(60)"
    )
    agent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with agent:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        agent.kill()
    wait_for(lambda: gone(pid), what="the end of the waiting process")


def test_what_no_process_can_be_given_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'A' cannot be set"):
        spec(tmp_path, "true", A="x\0y")
