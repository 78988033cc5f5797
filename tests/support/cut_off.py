"""Machines as network namespaces of this host, each on a cable of its own that can be pulled."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support import demand

ROOT = Path(__file__).parents[2]
_NUMBERS = itertools.count(1)


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


class Machine:
    """Use as a context manager. `host` is this host's address as the machine sees it."""

    def __init__(self) -> None:
        number = next(_NUMBERS)
        tag = f"vh{os.getpid() % 100_000:x}n{number}"  # an interface has at most 15 characters
        self.name, self._cable = tag, f"{tag}h"
        subnet = f"10.{200 + os.getpid() % 50}.{number % 250}"
        self.host, self._address = f"{subnet}.1", f"{subnet}.2"
        self._agents: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Machine:
        try:
            _ip("netns", "add", self.name)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            demand.missing("namespace", f"`ip netns add`: {getattr(error, 'stderr', error)}")
        inside = f"{self.name}m"
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", inside)
        _ip("link", "set", inside, "netns", self.name)
        _ip("addr", "add", f"{self.host}/30", "dev", self._cable)
        _ip("link", "set", self._cable, "up")
        _ip("-n", self.name, "addr", "add", f"{self._address}/30", "dev", inside)
        _ip("-n", self.name, "link", "set", inside, "up")
        _ip("-n", self.name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *exc: object) -> None:
        for agent in self._agents:
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
                agent.send_signal(number)
                try:
                    agent.wait(3)
                except subprocess.TimeoutExpired:
                    continue
                break
        _ip("link", "del", self._cable, check=False)
        _ip("netns", "del", self.name, check=False)

    def pull_cable(self) -> None:
        _ip("link", "set", self._cable, "down")

    def plug_in(self) -> None:
        _ip("link", "set", self._cable, "up")

    def start_agent(
        self, port: int, work_dir: Path, *, group: str, deployment: str, factor: float
    ) -> None:
        """A worker agent on this machine, `factor` times as fast; its name is the machine's."""
        work_dir.mkdir(parents=True)
        command = ["ip", "netns", "exec", self.name, sys.executable]
        command += ["-m", "tests.support.hurried_agent", "run", "--queue", group]
        command += ["--deployment", deployment, "--name", self.name, "--runtime", "process"]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
        with open(work_dir / "agent.log", "wb") as log:
            process = subprocess.Popen(
                [*command, "--work-dir", str(work_dir)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={
                    **inherited,
                    "VALOHAI_AGENT_REDIS": f"redis://{self.host}:{port}/0",
                    "TIME_FACTOR": str(factor),
                },
            )
        self._agents.append(process)
