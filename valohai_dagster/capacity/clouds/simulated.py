"""The `simulated` kind of worker group: a cloud that is not there, with agents on this host for its machines.

For trying out scaling on a laptop: machines boot slowly, some never, lists lag, calls are refused, and spot machines are
taken back, as often as the settings say. What the cloud knows is kept in a file, and agents outlive the service, so a
restart finds everything as it was. Without a broker to connect agents to, machines have none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import TypeAdapter

from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.clouds import host_agents
from valohai_dagster.capacity.clouds.base import CloudError, Launch, identity_tags
from valohai_dagster.capacity.clouds.simulated_cloud import (
    ALIVE,
    SimulatedCloud,
    SimulatedMachine,
    Weather,
)
from valohai_dagster.capacity.model import Machine
from valohai_dagster.settings_groups import SimulatedGroupSettings

_FORGOTTEN_AFTER = timedelta(days=1)
NOTICE_SECONDS = 30.0  # that a spot machine is told before it is taken back
_MACHINES = TypeAdapter(dict[str, SimulatedMachine])
# Says itself who it is too, as whoever started it may die before.
_MACHINE = """printf '{"boot": "%s", "pid": %d}' "$2" $$ >"$1.new" && mv "$1.new" "$1"
sleep "$3"; shift 3; exec "$@"
"""
_COUNTS = TypeAdapter(dict[str, int])


def weather_of(settings: SimulatedGroupSettings) -> Weather:
    return Weather(
        seed=settings.seed,
        boot=(settings.boot_delay_seconds, settings.boot_delay_seconds),
        capacity_error_rate=settings.capacity_error_rate,
        throttle_rate=settings.throttle_rate,
        never_registers_rate=settings.never_registers_rate,
        preemption_rate_per_hour=settings.preemption_rate_per_hour,
        listing_lag=settings.listing_lag_seconds,
    )


class SimulatedDriver:
    """Several at once, in this process or others, see the same cloud: it is in `<state_dir>/simulated/<group>.json`."""

    kind = "simulated"
    can_stop = True

    def __init__(
        self,
        group: str,
        settings: SimulatedGroupSettings,
        *,
        deployment: str,
        state_dir: Path,
        redis_url: str | None = None,
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self._group, self._deployment, self._clock = group, deployment, clock
        self._cloud = SimulatedCloud(weather_of(settings), clock=clock, group=group)
        self._dir = state_dir / "simulated"
        self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._agents = None
        if redis_url is not None:
            self._agents = _Agents(
                group, settings, deployment=deployment, directory=self._dir, redis_url=redis_url
            )
        self._looked_at: datetime | None = None

    @property
    def cloud(self) -> SimulatedCloud:
        """To change its weather, in tests."""
        return self._cloud

    def check(self) -> Sequence[str]:
        try:
            self.list()
        except CloudError as error:
            return (str(error),)
        return ()

    def list(self) -> Sequence[Machine]:
        with self._opened() as cloud:
            self._take_back(cloud)
            return cloud.list()

    def launch(self, launch: Launch) -> Sequence[str]:
        tags = identity_tags(self._deployment, self._group, launch)
        with self._opened() as cloud:
            return cloud.launch(replace(launch, tags=tags))

    def terminate(self, machine_id: str) -> None:
        with self._opened() as cloud:
            cloud.terminate(machine_id)

    def stop(self, machine_id: str) -> None:
        with self._opened() as cloud:
            cloud.stop(machine_id)

    def start(self, machine_id: str) -> None:
        with self._opened() as cloud:
            cloud.start(machine_id)

    def protect(self, machine_id: str, *, on: bool) -> None:
        """Nobody else scales it."""

    def close(self) -> None:
        """Machines go on."""

    @contextmanager
    def _opened(self) -> Iterator[SimulatedCloud]:
        """The cloud as the file has it; what has changed is written, also if the call fails, and agents follow it."""
        path, cloud = self._dir / f"{self._group}.json", self._cloud
        with (self._dir / f"{self._group}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                known = json.loads(path.read_text())
                cloud.machines = _MACHINES.validate_python(known["machines"])
                cloud.asked = _COUNTS.validate_python(known["asked"])
            before = dict(cloud.machines), dict(cloud.asked)
            try:
                yield cloud
            finally:
                if (cloud.machines, cloud.asked) != before:
                    self._save(path, cloud)
                if self._agents is not None:
                    self._agents.follow(cloud, self._clock())

    def _save(self, path: Path, cloud: SimulatedCloud) -> None:
        old = self._clock() - _FORGOTTEN_AFTER
        kept = {
            name: one
            for name, one in cloud.machines.items()
            if one.ended_at is None or one.ended_at > old
        }
        machines = _MACHINES.dump_python(kept, mode="json")
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"machines": machines, "asked": cloud.asked}))
        new.replace(path)

    def _take_back(self, cloud: SimulatedCloud) -> None:
        """Spot machines, by chance: told first, taken when the notice is over."""
        now = self._clock()
        since, self._looked_at = self._looked_at or now, now
        for machine in list(cloud.machines.values()):
            if machine.reclaimed_at is not None and machine.reclaimed_at <= now:
                cloud.end(machine.id)
        for machine_id in cloud.to_be_reclaimed((now - since).total_seconds()):
            cloud.reclaim(machine_id, notice=NOTICE_SECONDS)
            if self._agents is not None:
                self._agents.warn(machine_id)


class _Agents:
    """The agents of a group's machines: processes of this host that wait for the machine to boot."""

    def __init__(
        self,
        group: str,
        settings: SimulatedGroupSettings,
        *,
        deployment: str,
        directory: Path,
        redis_url: str,
    ) -> None:
        self._group, self._settings, self._deployment = group, settings, deployment
        self._dir = directory / group
        self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._redis_url = redis_url

    def follow(self, cloud: SimulatedCloud, now: datetime) -> None:
        """Machines that run get their agents, once for each start; those of others end."""
        for machine in cloud.machines.values():
            state = machine.state(now)
            for number in range(self._settings.agents):
                name = f"{machine.id}-{number}"
                if state in ALIVE and machine.boots_at is not None:
                    self._start(name, machine, now)
                elif state is not None and state not in ALIVE:
                    self._kill(name)

    def warn(self, machine_id: str) -> None:
        """As the cloud does before it takes a machine back."""
        for number in range(self._settings.agents):
            self._signal(f"{machine_id}-{number}", signal.SIGTERM)

    def _start(self, name: str, machine: SimulatedMachine, now: datetime) -> None:
        assert machine.boots_at is not None
        started = self._dir / f"{name}.json"
        boot = machine.boots_at.isoformat()
        with contextlib.suppress(FileNotFoundError):
            if json.loads(started.read_text())["boot"] == boot:
                return
        if host_agents.lock_held(self._lock(name)):  # started by a process that has died since
            return
        delay = max(0.0, (machine.boots_at - now).total_seconds())
        agent = host_agents.command(
            self._group,
            self._settings,
            deployment=self._deployment,
            name=name,
            work_dir=self._dir / machine.id,
        )
        env = host_agents.environment(
            self._settings, redis_url=self._redis_url, machine_id=machine.id
        )
        process = host_agents.start(
            ["/bin/sh", "-c", _MACHINE, "machine", str(started), boot, str(delay), *agent],
            env,
            lock=self._lock(name),
            log=self._dir / f"{name}.log",
        )
        threading.Thread(target=process.wait, name=f"wait-{name}", daemon=True).start()
        started.write_text(json.dumps({"boot": boot, "pid": process.pid}))

    def _kill(self, name: str) -> None:
        """All of its session, as a machine takes everything with it."""
        if self._signal(name, signal.SIGKILL):
            return
        for path in (self._dir / f"{name}.json", self._lock(name)):
            path.unlink(missing_ok=True)

    def _signal(self, name: str, number: int) -> bool:
        """False when it is not there any more."""
        if not host_agents.lock_held(self._lock(name)):
            return False
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pid = json.loads((self._dir / f"{name}.json").read_text())["pid"]
            os.killpg(pid, number)
        return True

    def _lock(self, name: str) -> Path:
        return self._dir / f"{name}.lock"
