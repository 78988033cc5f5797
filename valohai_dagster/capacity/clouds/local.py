"""The `local` kind of worker group: agent processes on this host.

Each agent inherits a file lock that it holds for as long as it lives. So its death can be told for sure, also by a
service that was restarted and is not its parent, and no reused process id is ever mistaken for an agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from valohai_agent.protocol import Worker, WorkerState, digest, utcnow
from valohai_dagster.capacity.agent_planner import AgentSeen, GroupPolicy, plan
from valohai_dagster.capacity.clouds import host_agents
from valohai_dagster.settings_groups import LocalGroupSettings

log = logging.getLogger(__name__)

DrainWorker = Callable[[str, str], Awaitable[None]]  # worker, reason
AgentGone = Callable[[str, str], Awaitable[None]]  # worker, what happened


@dataclass(frozen=True, kw_only=True)
class Launched:
    """An agent process that some service of this deployment has started."""

    name: str
    pid: int
    started_at: datetime


@dataclass(frozen=True, kw_only=True)
class StartFailures:
    """Agents that ended badly without one having checked in since (E-07): the next start waits longer each time."""

    count: int = 0
    reason: str | None = None
    last: datetime | None = None

    def another(self, reason: str, now: datetime) -> StartFailures:
        return StartFailures(count=self.count + 1, reason=reason, last=now)

    def holds(self, now: datetime) -> bool:
        """1 s after the first failure, doubling up to ten minutes."""
        if self.last is None:
            return False
        return now - self.last < min(
            timedelta(seconds=2 ** (self.count - 1)), timedelta(minutes=10)
        )


class LocalGroup:
    """Starts agents when there is work, drains them after a grace, and knows which are dead."""

    def __init__(
        self,
        name: str,
        settings: LocalGroupSettings,
        *,
        state_dir: Path,
        redis_url: str,
        deployment: str,
        on_gone: AgentGone,
        drain: DrainWorker,
        log_format: str = "text",
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self.name = name
        self._settings = settings
        self._dir = state_dir / "agents"
        self._work_dir = state_dir / "work" / name
        # Other conductors on this host have agents of their own, whose locks are not here.
        self._prefix = f"{name}-{_host()}-{digest(str(state_dir))[:4]}"
        self._redis_url = redis_url
        self._deployment = deployment
        self._on_gone = on_gone
        self._drain = drain
        self._log_format = log_format
        self._clock = clock
        self._idle_since: dict[str, datetime] = {}
        self._draining: set[str] = set()
        self._lock = asyncio.Lock()
        self._children: set[str] = set()  # agents that this process waits for
        self._notes: set[asyncio.Future[None]] = set()
        self._failures = StartFailures()
        self._closed = False
        self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)

    @property
    def policy(self) -> GroupPolicy:
        return GroupPolicy(
            max_agents=self._settings.max_agents,
            slots=self._settings.slots,
            grace=timedelta(seconds=self._settings.scale_down_grace_seconds),
        )

    async def reconcile(self, waiting: int, workers: Mapping[str, Worker]) -> None:
        """One look at what is there, and the plan's actions. Cheap; called at every enqueue and every tick."""
        for name in self._sweep_dead():
            await self._on_gone(name, "its agent process is gone")
        async with self._lock:
            launched = self._known()
            agents = [self._seen(agent, workers.get(agent.name)) for agent in launched]
            if any(agent.checked_in for agent in agents):
                self._failures = StartFailures()
            decision = plan(waiting=waiting, agents=agents, policy=self.policy, now=self._clock())
            for reason in decision.reasons:
                log.info(
                    "group %s: %s", self.name, reason, extra={"action": "plan", "group": self.name}
                )
            for name in decision.drain:
                self._draining.add(name)
                await self._drain(name, "idle")
            for _ in range(0 if self._failures.holds(self._clock()) else decision.start):
                self._start()

    @property
    def trouble(self) -> str | None:
        """Why no agent comes up, for those who wait for one; None when all is well."""
        return self._failures.reason

    def alive(self) -> list[Launched]:
        return [agent for agent in self._known() if not self.is_dead(agent.name)]

    def is_dead(self, worker: str) -> bool:
        """True only if it was one of ours and is surely gone; False for living and for unknown workers."""
        held = host_agents.lock_held(self._dir / f"{worker}.lock")
        return worker.startswith(self._prefix) if held is None else not held

    async def drain_all(self, timeout: float) -> None:
        """Asks all agents to finish and go; those still there after `timeout` seconds are terminated."""
        for agent in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent.pid, signal.SIGTERM)
        deadline = asyncio.get_running_loop().time() + timeout
        while self.alive() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.1)
        for agent in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent.pid, signal.SIGKILL)

    def attempt_logs(self, execution_id: str, attempt: int) -> Path:
        """Where an agent of this group keeps the growing logs of an attempt, for salvage after its death."""
        return self._work_dir / execution_id / str(attempt) / "logs"

    def _seen(self, agent: Launched, worker: Worker | None) -> AgentSeen:
        busy = worker.busy if worker else 0
        if worker and busy == 0:
            self._idle_since.setdefault(agent.name, self._clock())
        else:
            self._idle_since.pop(agent.name, None)
        draining = agent.name in self._draining or bool(
            worker and worker.state is WorkerState.draining
        )
        return AgentSeen(
            name=agent.name,
            launched_at=agent.started_at,
            checked_in=worker is not None,
            slots=self._settings.slots,
            busy=busy,
            draining=draining,
            idle_since=self._idle_since.get(agent.name),
        )

    def _known(self) -> list[Launched]:
        return _launched(self._dir, f"{self.name}-")

    def _sweep_dead(self) -> list[str]:
        """Forgets agents that are gone; names those whose end nobody here waits for (an earlier service's)."""
        dead = [agent.name for agent in self._known() if self.is_dead(agent.name)]
        for name in dead:
            self._forget(name)
        return [name for name in dead if name not in self._children]

    def _forget(self, name: str) -> None:
        for suffix in (".json", ".lock"):
            (self._dir / f"{name}{suffix}").unlink(missing_ok=True)
        self._draining.discard(name)
        self._idle_since.pop(name, None)

    def _start(self) -> None:
        name = f"{self._prefix}{secrets.token_hex(3)}"
        process = host_agents.start(
            self._command(name),
            self._environment(),
            lock=self._dir / f"{name}.lock",
            log=self._dir / f"{name}.log",
        )
        entry = {"name": name, "pid": process.pid, "started_at": self._clock().isoformat()}
        (self._dir / f"{name}.json").write_text(json.dumps(entry))
        self._children.add(name)
        loop = asyncio.get_running_loop()
        threading.Thread(
            target=self._wait, args=(process, name, loop), name=f"wait-{name}", daemon=True
        ).start()

    def _wait(
        self, process: subprocess.Popen[bytes], name: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        """In a thread of its own, since an agent outlives a service that is told to go."""
        code = process.wait()
        with contextlib.suppress(RuntimeError):  # the service went first
            loop.call_soon_threadsafe(self._note_end, name, code)

    def close(self) -> None:
        """Tells of no more ends; the agents go on."""
        self._closed = True
        for note in self._notes:
            note.cancel()

    def _note_end(self, name: str, code: int) -> None:
        if self._closed:
            return
        task = asyncio.ensure_future(self._ended(name, code))
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def _ended(self, name: str, code: int) -> None:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        expected = name in self._draining and code == 0
        log_path = self._dir / f"{name}.log"
        log.log(
            logging.INFO if expected else logging.WARNING,
            "agent %s ended with %s; its log is %s",
            name,
            how,
            log_path,
            extra={"action": "agent-ended", "worker": name},
        )
        self._children.discard(name)
        self._forget(name)  # at the same moment, so that no sweep finds and tells this death again
        if expected:
            log_path.unlink(missing_ok=True)
        elif code != 0:
            self._failures = self._failures.another(
                f"the agent ended with {how}: {_last_line(log_path)} (log: {log_path})",
                self._clock(),
            )
        await self._on_gone(name, f"its agent process ended with {how}")

    def _command(self, name: str) -> list[str]:
        return host_agents.command(
            self.name,
            self._settings,
            deployment=self._deployment,
            name=name,
            work_dir=self._work_dir,
        )

    def _environment(self) -> dict[str, str]:
        return host_agents.environment(
            self._settings, redis_url=self._redis_url, log_format=self._log_format
        )


def _host() -> str:
    return os.uname().nodename.split(".")[0].lower()


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return "it left no log"
    return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")


def living_agents(state_dir: Path) -> list[Launched]:
    """All agents of this deployment that run on this host, whichever group they serve."""
    directory = state_dir / "agents"
    return [
        agent
        for agent in _launched(directory, "")
        if host_agents.lock_held(directory / f"{agent.name}.lock")
    ]


def _launched(directory: Path, prefix: str) -> list[Launched]:
    agents = []
    for path in sorted(directory.glob(f"{prefix}*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            data: dict[str, Any] = json.loads(path.read_text())
            started = datetime.fromisoformat(data["started_at"])
            agents.append(Launched(name=data["name"], pid=data["pid"], started_at=started))
    return agents
