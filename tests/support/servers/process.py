"""A server in processes of its own, ready when it answers, gone when it is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx

from tests.support import demand
from tests.support.ports import wait_for

ROOT = Path(__file__).resolve().parents[3]
SERVERS = ROOT / ".servers"
START_SECONDS = 60.0  # generous: two cores may be busy with other tests
LOG_TAIL_BYTES = 3000
# Ends the server when its standard input ends: a pytest that is killed, however, leaves none behind.
_WHILE_HELD = """
exec 3<&0
"$@" 3<&- </dev/null & child=$!
{ cat <&3 >/dev/null; kill "$child" 2>/dev/null; } &
exec 3<&-
wait "$child"
"""


def installed(path: str) -> Path:
    """The file below .servers/; skips or fails the test that needs it when it is not there."""
    program = SERVERS / path
    if not program.exists():
        demand.missing("stores", f"there is no {program}; run `make setup-servers`")
    return program


class ServerProcess:
    """One server with a directory of its own, which holds its data and its log and vanishes with it."""

    def __init__(self, name: str, *, directory: Path | None = None) -> None:
        self.name = name
        self.directory = directory or Path(tempfile.mkdtemp(prefix=f"vts-{name}-", dir="/tmp"))
        self._processes: list[tuple[subprocess.Popen[bytes], Path]] = []

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.stop()

    def run(
        self,
        command: Sequence[str | Path],
        *,
        name: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts one process of the server; its output goes to a log in the directory."""
        log = self.directory / f"{name or self.name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["sh", "-c", _WHILE_HELD, "sh", *map(str, command)],
                cwd=self.directory,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._processes.append((process, log))

    def wait(self, url: str) -> None:
        """Returns when the URL answers, whatever it says; a process that ended or is silent shows its log."""
        try:
            wait_for(
                lambda: self._answers(url), seconds=START_SECONDS, what=f"{self.name} at {url}"
            )
        except AssertionError as error:
            logs = self.log_tail()
            self.stop()
            raise AssertionError(f"{error}\n{logs}") from None

    def _answers(self, url: str) -> bool:
        for process, log in self._processes:
            assert process.poll() is None, f"{log.stem} ended with {process.returncode}"
        try:
            httpx.get(url, trust_env=False, timeout=5, verify=False)
        except httpx.TransportError:
            return False
        return True

    def log_tail(self) -> str:
        tails = [
            f"-- {log.name} --\n{log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors='replace')}"
            for _, log in self._processes
        ]
        return "\n".join(tails)

    def stop(self) -> None:
        for process, _ in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process, _ in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._processes = []
        shutil.rmtree(self.directory, ignore_errors=True)
