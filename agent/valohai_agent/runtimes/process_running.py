"""A started session of processes: its output, its end, its signals."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from valohai_agent.errors import OutputError
from valohai_agent.processes import attempt_processes, kill_attempt, used_by
from valohai_agent.protocol import Usage
from valohai_agent.runtimes import namespace
from valohai_agent.runtimes.base import Elsewhere, Entry, ExitStatus, OnOutput, SignalName
from valohai_agent.runtimes.exits import ON_WORKER, explain
from valohai_agent.runtimes.namespace_entry import FAILED
from valohai_agent.usage import Sample, UsageMeter
from valohai_agent.workspace import Workspace

log = logging.getLogger(__name__)

JOIN = Path(__file__).with_name("namespace_join.py")
DRAIN_SECONDS = 5.0  # for output of processes that outlived the command
READ_BYTES = 64 * 1024


class ProcessRunning:
    """Follows one session with a thread per pipe and one that waits for the end.

    The command's end is the end of all its processes, as with a container: what it left in the
    background is killed.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        workspace: Workspace,
        on_output: OnOutput,
        on_removed: Callable[[bool], None],
        *,
        venv: Path,
        gpus: str = "",
        environment: Mapping[str, str],
        namespaced: bool,
    ) -> None:
        self._process = process
        self._workspace = workspace
        self._on_output = on_output
        self._on_removed = on_removed
        self._venv, self._environment, self._namespaced = venv, environment, namespaced
        self._signalled = False
        self._killed = False
        self._status: ExitStatus | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._reaped = False
        self._oom_before = oom_kills()
        self._oom_killed = False
        self._meter = UsageMeter(self._sample, gpus=gpus)
        self._readers: list[threading.Thread] = []

    @property
    def id(self) -> str:
        return str(self._process.pid)

    def start(self) -> None:
        for name, pipe in (("stdout", self._process.stdout), ("stderr", self._process.stderr)):
            assert pipe is not None  # asked for by the runtime
            reader = threading.Thread(target=self._read, args=(name, pipe), name=name, daemon=True)
            self._readers.append(reader)
            reader.start()
        self._meter.start()
        threading.Thread(target=self._follow, name="wait", daemon=True).start()

    def wait(self, timeout: float | None = None) -> ExitStatus | None:
        return self._status if self._ended.wait(timeout) else None

    def signal(self, name: SignalName) -> None:
        self._signalled = True
        with self._lock:
            if not self._reaped:
                self._killed = self._killed or name == "SIGKILL"
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.Signals[name])
        if name == "SIGKILL":
            self._kill_rest()

    def usage(self) -> Usage:
        return self._meter.usage().model_copy(update={"oom_killed": self._oom_killed})

    @property
    def own_network(self) -> bool:
        return False

    def enter(self, argv: Sequence[str], *, terminal: str | None = None) -> Entry:
        """With the job's variables, whose marks make the end of the command the end of this too."""
        pid, directory = "-", str(self._workspace.repository)
        if self._namespaced:
            pid, directory = str(self._process.pid), "/valohai/repository"
        kind = "plain" if terminal is None else "tty"
        environment = {**self._environment, **({"TERM": terminal} if terminal else {})}
        program = [sys.executable, "-I", "-S", str(JOIN), pid, kind, directory]
        return Entry(argv=[*program, *argv], environment=environment)

    def copy_out(self, path: str, target: Path) -> Elsewhere | str | None:
        """Takes files of the job's private virtual environment only: all else here is the worker's own."""
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(os.path.realpath(self._venv)):
            return (
                "outside the job's directories and its virtual environment, which are all that a worker without "
                "containers uploads from; copy the file into the outputs directory"
            )
        if not real.is_file():
            return "which does not exist" if not real.exists() else "which is no regular file"
        try:
            shutil.copy2(real, target, follow_symlinks=False)
        except OSError as error:
            raise OutputError(f"{path} could not be copied to {target.parent}: {error}") from error
        return None

    def remove(self) -> None:
        self.signal("SIGKILL")
        ended = self._ended.wait(DRAIN_SECONDS * 2)
        namespace.remove_root(self._workspace.run)
        self._on_removed(ended)

    # -- threads -----------------------------------------------------------------------------------
    def _read(self, name: str, pipe: IO[bytes]) -> None:
        with pipe:
            while data := os.read(pipe.fileno(), READ_BYTES):
                try:
                    self._on_output(name, data)
                except Exception:
                    log.exception("output of %s", self.id, extra={"action": "output"})

    def _follow(self) -> None:
        try:
            code = self._reap()
            self._kill_rest()
            for reader in self._readers:
                reader.join(DRAIN_SECONDS)
            self._status = self._explain(code)
        except Exception as error:
            log.exception("process %s", self.id, extra={"action": "follow"})
            self._status = ExitStatus(code=255, message=f"The agent lost the process: {error}")
        finally:
            self._ended.set()

    def _reap(self) -> int:
        """Waits without freeing the process id, so that no signal of ours hits a stranger."""
        pid = self._process.pid
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            _, status, used = os.wait4(pid, 0)
            self._reaped = True
        code = os.waitstatus_to_exitcode(status)
        self._process.returncode = code
        # A process begins with the peak of the one that started it: up to that the figure is the agent's own.
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = used.ru_maxrss * 1024 if used.ru_maxrss > own else None
        self._meter.stop(Sample(memory_bytes=memory, cpu_seconds=used.ru_utime + used.ru_stime))
        return 128 - code if code < 0 else code

    def _explain(self, code: int) -> ExitStatus:
        reason = namespace.failure(self._workspace.run)
        if code == FAILED and reason is not None:
            return ExitStatus(code=code, started=False, message=namespace.not_started(reason))
        oom = code == 137 and not self._killed and oom_kills() > self._oom_before
        self._oom_killed = oom
        return explain(code, oom=oom, signalled=self._signalled, programs=ON_WORKER)

    def _sample(self) -> Sample | None:
        used = used_by(attempt_processes(self._workspace.execution_id, self._workspace.attempt))
        return Sample(cpu_seconds=used[0], memory_bytes=used[1]) if used else None

    def _kill_rest(self) -> None:
        kill_attempt(self._workspace.execution_id, self._workspace.attempt)


def oom_kills(path: Path = Path("/proc/vmstat")) -> int:
    """How often this machine's kernel killed for lack of memory."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
