"""Looks after a group on paper in processes that kill themselves (SIGKILL) between any two writes; for recovery tests.

    python -m tests.support.mortal_reconciler DIRECTORY

For every point that a whole life passes, its first and its second passage, one child process dies there; a second one
takes over with the same records and the same cloud and goes on until everything is quiet. One line of JSON each tells
how the world ended. The product knows nothing of the points: its methods are wrapped here.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

from tests.support.clouds.paper import PaperCloud
from valohai_dagster.capacity.machines import MachineRecords
from valohai_dagster.capacity.model import Policy
from valohai_dagster.capacity.reconcile import Reconciler
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import Settings

POLICY = Policy(
    max_machines=2,
    grace=timedelta(seconds=30),
    boot=timedelta(minutes=3),
    stop_when_idle=True,
    destroy_after=timedelta(seconds=30),
)
TICKS = 90
BOOK = ("save", "intend", "settle", "hold", "release", "note")
CLOUD = ("launch", "terminate", "stop", "start", "hear")
SCENARIOS = {"quick": (*BOOK, *CLOUD), "lagging": ("intend", "launch", "settle", "terminate")}


def main() -> None:
    empty = Path(sys.argv[1], "empty")
    open_records(Settings(state_dir=empty)).close()
    for scenario, points in SCENARIOS.items():
        home = Path(sys.argv[1], scenario)
        passages = Counter[str]()
        _world(home / "whole", scenario)
        _life(home / "whole", scenario, passages, None)
        _tell(home / "whole", scenario, "none")
        deaths = [(point, n) for point, most in passages.items() for n in (1, 2) if n <= most]
        for point, number in deaths:
            if point.split("-")[1] not in points:
                continue
            place = home / f"{point}-{number}"
            _world(place, scenario)
            assert _in_child(place, scenario, (point, number)) == -signal.SIGKILL
            assert _in_child(place, scenario, None) == 0
            _tell(place, scenario, f"{point}:{number}")


def _world(place: Path, scenario: str) -> None:
    shutil.copytree(place.parent.parent / "empty", place / "state")
    _cloud(place, scenario).submit(3)


def _cloud(place: Path, scenario: str) -> PaperCloud:
    lag = 25.0 if scenario == "lagging" else 0.0
    can_stop = scenario == "quick"
    return PaperCloud(place / "cloud.json", lag=lag, job=40.0, boot=30.0, can_stop=can_stop)


def _in_child(place: Path, scenario: str, death: tuple[str, int] | None) -> int:
    """Its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            _life(place, scenario, Counter(), death)
        finally:
            code = 1 if sys.exc_info()[0] else 0
            if code:
                traceback.print_exc()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _life(
    place: Path, scenario: str, passages: Counter[str], death: tuple[str, int] | None
) -> None:
    records = open_records(Settings(state_dir=place / "state"))
    cloud = _cloud(place, scenario)
    book = MachineRecords(records, "gpu", kind="paper", clock=cloud.clock)
    _mortal(book, BOOK, passages, death)
    _mortal(cloud, CLOUD, passages, death)
    tokens = (f"{os.getpid()}-{number}" for number in count())
    reconciler = Reconciler(
        "gpu",
        cloud,
        book,
        prepare=lambda launch: launch,
        clock=cloud.clock,
        make_token=lambda: next(tokens),
    )
    for _ in range(TICKS):
        cloud.hear(reconciler.step(cloud.load(), POLICY))
        cloud.advance()
        if not (cloud.read().waiting or book.machines() or book.intents()):
            break
    records.close()


def _mortal(
    thing: Any, methods: tuple[str, ...], passages: Counter[str], death: tuple[str, int] | None
) -> None:
    def passes(point: str) -> None:
        passages[point] += 1
        if death == (point, passages[point]):
            os.kill(os.getpid(), signal.SIGKILL)

    for name in methods:
        original = getattr(thing, name)

        @functools.wraps(original)
        def dying(*args: Any, original: Any = original, name: str = name, **values: Any) -> Any:
            passes(f"before-{name}")
            result = original(*args, **values)
            passes(f"after-{name}")
            return result

        setattr(thing, name, dying)


def _tell(place: Path, scenario: str, death: str) -> None:
    world = _cloud(place, scenario).read()
    records = open_records(Settings(state_dir=place / "state"))
    book = MachineRecords(records, "gpu", clock=_cloud(place, scenario).clock)
    ending = {
        "scenario": scenario,
        "death": death,
        "done": world.done,
        "waiting": world.waiting,
        "alive": len(world.alive()),
        "made": len(world.boxes),
        "most": world.most,
        "taken_while_busy": world.taken_while_busy,
        "told": len(set(world.deaths)),
        "known": len(book.machines()),
        "open": len(book.intents()),
    }
    records.close()
    print(json.dumps(ending), flush=True)


if __name__ == "__main__":
    main()
