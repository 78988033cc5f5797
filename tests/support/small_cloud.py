"""A cloud in memory that does exactly what a test tells it: machines appear at once, and calls fail when wanted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble
from valohai_dagster.capacity.model import Machine, MachineState
from valohai_dagster.settings_groups import CloudGroupSettings, SimulatedGroupSettings


class SmallCloud:
    """A `Driver`, for all groups that ask for one; `open` is what an ExecutionService takes as `drivers`."""

    kind = "simulated"
    can_stop = True

    def __init__(self) -> None:
        self.machines: dict[str, Machine] = {}
        self.calls: list[tuple[str, Any]] = []
        self.launched_at: list[float] = []  # by time.monotonic
        self.problems: list[str] = []  # what `check` finds
        self.refuse: CloudError | None = None  # what launches are answered with
        self.opened: list[CloudGroupSettings] = []
        self._lock = threading.Lock()

    def open(self, name: str, settings: CloudGroupSettings) -> SmallCloud:
        self.opened.append(settings)
        return self

    def no(self, text: str, trouble: Trouble = Trouble.credentials, **values: Any) -> None:
        """From now on launches are refused."""
        self.refuse = CloudError(text, code="Refused", trouble=trouble, **values)

    def called(self, what: str) -> list[Any]:
        with self._lock:
            return [about for name, about in self.calls if name == what]

    def lose(self, machine_id: str) -> None:
        """The machine ends without anybody having asked for it; the cloud lists it as gone, as clouds do for a while."""
        with self._lock:
            gone = replace(self.machines[machine_id], state=MachineState.gone)
            self.machines[machine_id] = gone

    # -- Driver ------------------------------------------------------------------------------------------------
    def check(self) -> Sequence[str]:
        return self.problems

    def list(self) -> Sequence[Machine]:
        with self._lock:
            return list(self.machines.values())

    def launch(self, launch: Launch) -> Sequence[str]:
        with self._lock:
            self.launched_at.append(time.monotonic())
            self.calls.append(("launch", launch))
            if self.refuse is not None:
                raise self.refuse
            ids = [f"m-{launch.token}-{number}" for number in range(launch.count)]
            for one in ids:
                machine = Machine(
                    id=one,
                    zone=launch.zone,
                    purchase=launch.purchase,
                    created_at=utcnow(),
                    token=launch.token,
                )
                self.machines.setdefault(one, machine)
            return ids

    def terminate(self, machine_id: str) -> None:
        with self._lock:
            self.calls.append(("terminate", machine_id))
            self.machines.pop(machine_id, None)

    def stop(self, machine_id: str) -> None:
        self._become("stop", machine_id, MachineState.stopped)

    def start(self, machine_id: str) -> None:
        self._become("start", machine_id, MachineState.running)

    def _become(self, call: str, machine_id: str, state: MachineState) -> None:
        with self._lock:
            self.calls.append((call, machine_id))
            self.machines[machine_id] = replace(self.machines[machine_id], state=state)

    def protect(self, machine_id: str, *, on: bool) -> None:
        self.calls.append(("protect", (machine_id, on)))

    def close(self) -> None:
        """Nothing to close; the cloud outlives its drivers."""


def until(true: Callable[[], object], seconds: float = 15.0) -> None:
    """Waits for it."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def cloud_group(**values: Any) -> SimulatedGroupSettings:
    """A group whose machines are a SmallCloud's."""
    return SimulatedGroupSettings(**{"kind": "simulated", **values})
