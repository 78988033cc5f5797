"""A cloud on paper: machines, their workers and the jobs are a JSON file, so that they outlive any process.

It stands in for a real cloud where processes that look after a group are killed, and where time has to pass quickly:
its clock stands still until `advance`. Lists lag behind launches; a machine that has ended is listed as gone for a minute.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tests.support.clock import START
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble
from valohai_dagster.capacity.look import Load, Outcome
from valohai_dagster.capacity.model import Machine, MachineState, Purchase, Seat

GONE_LISTED = 60.0  # seconds


@dataclass
class Box:
    """One machine and its only worker. Times are seconds since the start."""

    token: str
    zone: str
    purchase: str
    created: float
    state: str = "running"
    ended: float | None = None
    here: float | None = None  # when its worker checked in
    busy_until: float | None = None
    idle_since: float | None = None
    told: bool = False  # to drain


@dataclass
class World:
    seconds: float = 0.0
    waiting: int = 0
    done: int = 0
    taken_while_busy: int = 0
    most: int = 0  # machines at once
    boxes: dict[str, Box] = field(default_factory=dict)
    deaths: list[str] = field(default_factory=list)

    def alive(self) -> list[Box]:
        return [box for box in self.boxes.values() if box.ended is None]


class PaperCloud:
    """The driver and the world at once. `trouble`: what each call raises, by zone ("*": in all), for launches only;
    `list_trouble` for lists; `keeps_tokens=False`: lists do not tell them."""

    kind = "paper"

    def __init__(
        self,
        path: Path,
        *,
        boot: float = 60.0,
        job: float = 100.0,
        lag: float = 0.0,
        can_stop: bool = False,
        keeps_tokens: bool = True,
    ) -> None:
        self._path, self._boot, self._job, self._lag = path, boot, job, lag
        self.can_stop, self._keeps_tokens = can_stop, keeps_tokens
        self.trouble: dict[str, CloudError] = {}
        self.list_trouble: CloudError | None = None
        self.on_list: Callable[[], None] = lambda: None
        self.duds = False  # machines whose workers never check in
        self.calls: list[str] = []

    # -- the world ---------------------------------------------------------------------------------------------

    def read(self) -> World:
        if not self._path.exists():
            return World()
        values: dict[str, Any] = json.loads(self._path.read_text())
        boxes = {name: Box(**box) for name, box in values.pop("boxes").items()}
        return World(**values, boxes=boxes)

    def write(self, world: World) -> None:
        world.most = max(world.most, len(world.alive()))
        text = json.dumps(world, default=vars)
        new = self._path.with_suffix(".new")
        new.write_text(text)
        os.replace(new, self._path)

    def clock(self) -> datetime:
        return START + timedelta(seconds=self.read().seconds)

    def submit(self, jobs: int) -> None:
        world = self.read()
        world.waiting += jobs
        self.write(world)

    def advance(self, seconds: float = 10.0) -> None:
        """Machines boot, jobs end and begin, workers that were told to go go."""
        world = self.read()
        world.seconds += seconds
        now = world.seconds
        for box in world.alive():
            if box.state == "running":
                self._work(world, box, now)
        self.write(world)

    def _work(self, world: World, box: Box, now: float) -> None:
        if box.here is None:
            if self.duds or now - box.created < self._boot:
                return
            box.here, box.idle_since = now, now
        if box.busy_until is not None and now >= box.busy_until:
            box.busy_until, box.idle_since = None, now
            world.done += 1
        if box.busy_until is None and world.waiting and not box.told:
            world.waiting -= 1
            box.busy_until, box.idle_since = now + self._job, None

    def load(self) -> Load:
        world = self.read()
        now = START + timedelta(seconds=world.seconds)
        seats = [
            Seat(
                worker=f"w-{name}",
                machine_id=name,
                busy=int(box.busy_until is not None),
                draining=box.told,
                idle_since=None if box.idle_since is None else _time(box.idle_since),
                seen_at=now,
            )
            for name, box in world.boxes.items()
            if box.ended is None and box.state == "running" and box.here is not None
        ]
        return Load(waiting={0: world.waiting} if world.waiting else {}, seats=tuple(seats))

    def hear(self, outcome: Outcome) -> None:
        """What a conductor does with an outcome."""
        world = self.read()
        for worker in outcome.drain:
            world.boxes[worker.removeprefix("w-")].told = True
        world.deaths += outcome.dead
        self.write(world)

    def lose(self, name: str) -> None:
        """The machine ends by itself; what it ran waits again."""
        world = self.read()
        _end(world, world.boxes[name])
        self.write(world)

    def add(self, name: str, **values: Any) -> None:
        """A machine that somebody else made, with our tags."""
        world = self.read()
        values = {
            "token": "",
            "zone": "",
            "purchase": "on-demand",
            "created": world.seconds,
        } | values
        world.boxes[name] = Box(**values)
        self.write(world)

    # -- the driver --------------------------------------------------------------------------------------------

    def check(self) -> Sequence[str]:
        return []

    def list(self) -> Sequence[Machine]:
        self.calls.append("list")
        if self.list_trouble is not None:
            raise self.list_trouble
        world = self.read()
        listed = [
            self._machine(name, box)
            for name, box in world.boxes.items()
            if world.seconds - box.created >= self._lag
            and (box.ended is None or world.seconds - box.ended < GONE_LISTED)
        ]
        self.on_list()
        return listed

    def _machine(self, name: str, box: Box) -> Machine:
        return Machine(
            id=name,
            zone=box.zone,
            purchase=Purchase(box.purchase),
            state=MachineState.gone if box.ended is not None else MachineState(box.state),
            created_at=_time(box.created),
            token=(box.token or None) if self._keeps_tokens else None,
        )

    def launch(self, launch: Launch) -> Sequence[str]:
        self.calls.append(f"launch {launch.count} {launch.zone}".strip())
        trouble = self.trouble.get(launch.zone) or self.trouble.get("*")
        if trouble is not None:
            raise trouble
        world = self.read()
        made = [name for name, box in world.boxes.items() if box.token == launch.token]
        for _ in range(launch.count - len(made)):
            world.boxes[f"m{len(world.boxes)}"] = Box(
                token=launch.token,
                zone=launch.zone,
                purchase=launch.purchase.value,
                created=world.seconds,
            )
        self.write(world)
        return []

    def terminate(self, machine_id: str) -> None:
        self.calls.append(f"terminate {machine_id}")
        world = self.read()
        box = world.boxes[machine_id]
        world.taken_while_busy += box.busy_until is not None
        _end(world, box)
        self.write(world)

    def stop(self, machine_id: str) -> None:
        self._turn(machine_id, "stopped")

    def start(self, machine_id: str) -> None:
        self._turn(machine_id, "running")

    def _turn(self, machine_id: str, state: str) -> None:
        self.calls.append(f"{state} {machine_id}")
        world = self.read()
        box = world.boxes[machine_id]
        world.taken_while_busy += box.busy_until is not None
        box.state, box.here, box.told, box.idle_since = state, None, False, None
        self.write(world)

    def protect(self, machine_id: str, *, on: bool) -> None:
        pass

    def close(self) -> None:
        pass


def refusal(
    trouble: Trouble, *, zone: str | None = None, text: str = "", **values: Any
) -> CloudError:
    message = text or f"no: {trouble.value}" + (f" in {zone}" if zone else "")
    return CloudError(message, code=trouble.value, trouble=trouble, zone=zone, **values)


def _end(world: World, box: Box) -> None:
    if box.busy_until is not None:
        world.waiting += 1
    box.ended, box.busy_until = world.seconds, None


def _time(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)
