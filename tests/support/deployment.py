"""A deployment as an operator runs it: a settings file, a conductor process, agent processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.support.ports import wait_for
from tests.support.projects import spec_of
from valohai_dagster.embedded.conductor import ConductorInfo, running_conductor
from valohai_dagster.executions.client import ExecutionClient
from valohai_dagster.executions.stream import EventKind, ExecutionView, FollowEvent
from valohai_dagster.settings import Settings, load_settings

START_SECONDS = 60.0


class Background:
    """A process with its output in a file."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        self.began_at = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **environment},
            )

    @property
    def log(self) -> str:
        return self._log.read_bytes()[self.began_at :].decode(errors="replace")

    def wait(self, seconds: float = 30.0) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.log}") from None

    def stop(self) -> None:
        """As politely as it lets us."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
                return


class Deployment:
    """Use as a context manager; everything that was started ends with it."""

    def __init__(self, root: Path, toml: str) -> None:
        self.root = root
        self.config = root / "valohai.toml"
        root.mkdir(parents=True, exist_ok=True)
        self.config.write_text(toml)
        self._started: list[Background] = []
        self._clients: list[ExecutionClient] = []

    def __enter__(self) -> Deployment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disconnect()
        for process in reversed(self._started):
            process.stop()

    def disconnect(self) -> None:
        """Closes every client that was handed out."""
        for client in self._clients:
            client.close()
        self._clients.clear()

    @property
    def settings(self) -> Settings:
        return load_settings(self.config)

    def run(self, *arguments: str, environment: Mapping[str, str] | None = None) -> Background:
        """`python -m ...` with this deployment's settings."""
        name = arguments[0].replace(".", "-")
        values = {"VALOHAI_CONFIG": str(self.config), **(environment or {})}
        command = [sys.executable, "-m", *arguments]
        process = Background(command, self.root / f"{name}.log", values)
        self._started.append(process)
        return process

    def done(
        self, *arguments: str, environment: Mapping[str, str] | None = None, seconds: float = 120.0
    ) -> str:
        """Runs a command to its good end; its output."""
        process = self.run(*arguments, environment=environment)
        code = process.wait(seconds)
        assert code == 0, f"{' '.join(arguments)} ended with {code}:\n{process.log}"
        return process.log

    def down(self) -> None:
        """Ends what was started on demand."""
        self.done("valohai_dagster", "down")

    def start_conductor(self) -> ConductorInfo:
        process = self.run("valohai_dagster", "conductor")

        def serving() -> ConductorInfo | None:
            assert process.process.poll() is None, process.log
            return running_conductor(self.settings)

        info = wait_for(serving, seconds=START_SECONDS, what="the conductor")
        assert info is not None
        return info

    def start_agent(self, group: str, redis_url: str, *options: str) -> Background:
        """A worker of a static group, in a work directory of its own."""
        name = f"{group}-{len(self._started)}"
        arguments = ["run", "--queue", group, "--name", name]
        arguments += ["--work-dir", str(self.root / "work" / name), *options]
        return self.run("valohai_agent", *arguments, environment={"VALOHAI_AGENT_REDIS": redis_url})

    def client(self) -> ExecutionClient:
        client = ExecutionClient.open(self.settings)
        self._clients.append(client)
        return client

    def execute(
        self, project: Path, step: str = "run", *, seconds: float = 90.0, **config: object
    ) -> tuple[ExecutionView, list[FollowEvent]]:
        """Runs a step to its end; the last view and everything that was told on the way."""
        client = self.client()
        spec = spec_of(project, step, self.settings, **config)
        client.submit(spec)
        return follow(client, spec.execution_id, seconds=seconds)


def follow(
    client: ExecutionClient, execution_id: str, *, seconds: float = 90.0
) -> tuple[ExecutionView, list[FollowEvent]]:
    """Everything that is told up to the end."""
    seen: list[FollowEvent] = []
    deadline = time.monotonic() + seconds
    for event in client.follow(execution_id):
        if event is not None:
            seen.append(event)
        assert time.monotonic() < deadline, f"no end; seen: {[e.message for e in seen]}"
    assert seen[-1].kind is EventKind.final
    return ExecutionView.model_validate(seen[-1].data), seen
