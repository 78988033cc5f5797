"""Keeps the agents of a machine running where no systemd does, such as in a container: the container's main process."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence

from valohai_agent.errors import AgentError
from valohai_agent.machine.dead_man import look
from valohai_agent.machine.joining import bring_up_to_date
from valohai_agent.machine.places import Machine, Places
from valohai_agent.machine.program import EXIT_UPDATE
from valohai_agent.redis_link import Backoff

logger = logging.getLogger(__name__)

LOOK_SHARE = 20  # the dead man's switch is looked at so many times in its time
LONGEST_LOOK_SECONDS = 60.0
WAIT_SECONDS = 0.5
STEADY_SECONDS = 60.0  # an agent that ran for so long has not failed to start
_WITHHELD = ("PYTHONPATH", "VALOHAI_JOIN_TOKEN")  # the token may be good for other machines still


class Keeper:
    """Runs until it is told to go, or nobody has spoken to this machine for too long.

    An agent that has drained stays down; the machine waits for whoever drained it to take it away. Any other is
    started again, with what the control plane gives by then.
    """

    def __init__(self, places: Places, machine: Machine, program: Sequence[str]) -> None:
        self._places, self._machine, self._program = places, machine, list(program)
        self._leaving = threading.Event()
        self._agents: dict[int, _Agent] = {}

    def run(self) -> int:
        """The exit code: 0 when told to go, 1 when the machine is abandoned."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._received)
        for number in range(self._machine.answer.agents):
            self._agents[number] = _Agent(self._start(number))
        next_look = time.monotonic() + self._look_seconds
        abandoned = False
        while not self._leaving.wait(WAIT_SECONDS):
            for number, agent in self._agents.items():
                self._tend(number, agent)
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + self._look_seconds
                if look(self._places, hostname=socket.gethostname()):
                    abandoned = True
                    self._received(signal.SIGTERM, None)
        for agent in self._agents.values():
            agent.process.wait()
        return 1 if abandoned else 0

    @property
    def _look_seconds(self) -> float:
        limit = self._machine.answer.dead_man_seconds or LONGEST_LOOK_SECONDS * LOOK_SHARE
        return min(LONGEST_LOOK_SECONDS, limit / LOOK_SHARE)

    def _tend(self, number: int, agent: _Agent) -> None:
        code = agent.process.poll()
        if code is None or agent.drained or time.monotonic() < agent.again_at:
            return
        if agent.again_at:
            self._machine = bring_up_to_date(self._places, hostname=socket.gethostname())
            agent.restarted(self._start(number))
        elif code == 0:
            agent.drained = True
            logger.info("agent %d has drained", number, extra={"action": "drained"})
        else:
            seconds = agent.failed(code)
            logger.warning(
                "agent %d ended with %s; again in %.1f s",
                number,
                code,
                seconds,
                extra={"action": "agent-ended"},
            )

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        own = self._places.environment_of(self._machine, number)
        inherited = {k: v for k, v in os.environ.items() if k not in _WITHHELD}
        environment: Mapping[str, str] = {
            **inherited,
            **self._places.environment(self._machine),
            **own,
        }
        try:
            return subprocess.Popen([*self._program, "run"], env=environment)
        except OSError as error:
            raise AgentError(f"`{self._program[0]}` cannot be run: {error}.") from error

    def _received(self, number: int, frame: object) -> None:
        self._leaving.set()
        for agent in self._agents.values():
            if agent.process.poll() is None:
                agent.process.send_signal(number)


class _Agent:
    """One agent process, and when it is started again."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.drained, self.again_at = process, False, 0.0
        self._backoff = Backoff(first=1.0, longest=60.0)
        self._started_at = time.monotonic()

    def failed(self, code: int) -> float:
        """Seconds to wait. One that makes way for its successor is not failing."""
        if code == EXIT_UPDATE or time.monotonic() - self._started_at > STEADY_SECONDS:
            self._backoff.reset()
        seconds = 0.0 if code == EXIT_UPDATE else self._backoff.seconds()
        self.again_at = time.monotonic() + seconds
        return seconds

    def restarted(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.again_at, self._started_at = process, 0.0, time.monotonic()
