"""A real agent in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.agent_conductor import DEPLOYMENT, GROUP


class AgentProcess:
    """`valohai-agent run` with its log in a file; `stop` ends it whatever its state."""

    def __init__(
        self,
        url: str,
        work_dir: Path,
        *options: str,
        name: str = "w1",
        runtime: str = "process",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name, self.work_dir = name, work_dir
        work_dir.mkdir(parents=True, exist_ok=True)
        self._log = work_dir / f"{name}.log"
        command = [sys.executable, "-m", "valohai_agent", "run", "--queue", GROUP, "--name", name]
        command += [
            "--deployment",
            DEPLOYMENT,
            "--runtime",
            runtime,
            "--work-dir",
            str(work_dir),
            *options,
        ]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**inherited, "VALOHAI_AGENT_REDIS": url, **(environment or {})},
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 20.0) -> int:
        return self.process.wait(seconds)

    def stop(self) -> None:
        """Politely first, so that its commands end too."""
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
            if self.process.poll() is not None:
                return
            self.process.send_signal(number)
            try:
                self.process.wait(3)
            except subprocess.TimeoutExpired:
                continue
