"""Groups as the planner sees them, made by hand and by hypothesis, and what a plan makes of them when it works."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import count
from typing import Any

from hypothesis import strategies as st

from valohai_dagster.capacity.model import (
    Action,
    ActionKind,
    Hold,
    Intent,
    Machine,
    MachineState,
    Plan,
    Policy,
    Purchase,
    Seat,
    View,
)

NOW = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
LONG_AGO = NOW - timedelta(days=1)
ALIVE = (MachineState.starting, MachineState.running)


def ago(**time: float) -> datetime:
    return NOW - timedelta(**time)


def machine(name: str = "m", **changes: Any) -> Machine:
    return Machine(**{"id": name, "created_at": ago(hours=1), **changes})


def seat(on: str = "m", **changes: Any) -> Seat:
    return Seat(**{"worker": f"w-{on}", "machine_id": on, "seen_at": NOW, **changes})


def view(*machines: Machine, waiting: int = 0, **changes: Any) -> View:
    """All of them have registered and were seen just now, if nothing else is said."""
    names = [one.id for one in machines]
    values: dict[str, Any] = {
        "waiting": {0: waiting} if waiting else {},
        "machines": machines,
        "registered": frozenset(names),
        "last_seen": dict.fromkeys(names, NOW),
        "listed_at": NOW,
    }
    return View(**{**values, **changes})


def idle(*names: str, since: datetime = LONG_AGO, **changes: Any) -> tuple[Seat, ...]:
    return tuple(seat(name, idle_since=since, **changes) for name in names)


# -- by hypothesis -------------------------------------------------------------------------------------------------

ZONES = ("a", "b")
_times = st.sampled_from(
    [NOW, ago(seconds=20), ago(minutes=3), ago(minutes=10), ago(hours=1), LONG_AGO]
)
_purchases = st.sampled_from(Purchase)


@st.composite
def _seats(draw: st.DrawFn, name: str) -> list[Seat]:
    found = []
    for number in range(draw(st.integers(0, 2))):
        slots = draw(st.integers(1, 2))
        busy = draw(st.integers(0, slots))
        found.append(
            seat(
                name,
                worker=f"w-{name}-{number}",
                slots=slots,
                busy=busy,
                draining=draw(st.booleans()),
                outdated=draw(st.sampled_from([False, False, False, True])),
                idle_since=None if busy else draw(_times),
                seen_at=draw(st.sampled_from([NOW, NOW, NOW, ago(minutes=3)])),
            )
        )
    return found


@st.composite
def views(draw: st.DrawFn) -> View:
    """Any mixture: also what should not come about does."""
    machines, seats, intents = [], [], []
    for number in range(draw(st.integers(0, 6))):
        name = f"m{number}"
        machines.append(
            machine(
                name,
                zone=draw(st.sampled_from(ZONES)),
                purchase=draw(_purchases),
                state=draw(st.sampled_from([*ALIVE, MachineState.running, *MachineState])),
                created_at=draw(_times),
                token=draw(st.sampled_from([None, "t0", "t1"])),
                bootstrap=draw(st.sampled_from(["1", "1", "0"])),
                reclaimed_at=draw(st.sampled_from([None, None, None, NOW])),
            )
        )
        seats += draw(_seats(name)) if machines[-1].state in ALIVE else []
    seats += draw(st.sampled_from([[], [], idle("unlisted")]))
    names = [one.id for one in machines]
    for number in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from([ActionKind.launch, ActionKind.terminate, ActionKind.stop]))
        target = draw(st.sampled_from(names)) if names and kind is not ActionKind.launch else None
        count_ = draw(st.integers(1, 3)) if target is None else 1
        kind = kind if target else ActionKind.launch
        intents.append(
            Intent(token=f"t{number}", action=kind, at=NOW, count=count_, machine_id=target)
        )
    some = st.sets(st.sampled_from(names)) if names else st.just(set[str]())
    return View(
        waiting=draw(st.dictionaries(st.integers(-1, 1), st.integers(0, 4), max_size=2)),
        machines=tuple(machines),
        seats=tuple(seats),
        registered=frozenset(draw(some)),
        drained=frozenset(draw(some)),
        intents=tuple(intents),
        holds=tuple(draw(st.lists(holds, max_size=2))),
        last_seen={name: draw(_times) for name in draw(some)},
        stopped_since={name: draw(_times) for name in draw(some)},
        started={name: draw(_times) for name in draw(st.one_of(st.just(set[str]()), some))},
        listed_at=draw(st.sampled_from([NOW, NOW, NOW, None])),
    )


holds = st.builds(
    Hold,
    zone=st.sampled_from([None, *ZONES]),
    purchase=st.sampled_from([None, *Purchase]),
    until=st.sampled_from([ago(seconds=1), NOW + timedelta(minutes=1)]),
    reason=st.just("no capacity"),
)

policies = st.builds(
    Policy,
    enabled=st.sampled_from([True, True, True, False]),
    min_machines=st.integers(0, 3),
    max_machines=st.integers(0, 6),
    slots=st.integers(1, 2),
    zones=st.sampled_from([ZONES, ("a",)]),
    spot=st.booleans(),
    on_demand_fallback=st.booleans(),
    stop_when_idle=st.booleans(),
    bootstrap=st.sampled_from([None, "1"]),
)


# -- when everything works ------------------------------------------------------------------------------------------


def carried_out(seen: View, plan: Plan, policy: Policy) -> View:
    """The same moment after all of the plan has been done, confirmed, and listed."""
    numbers = count(len(seen.machines))
    for action in plan.actions:
        seen = _EFFECTS[action.kind](seen, action, policy, numbers)
    return seen


def _launched(seen: View, action: Action, policy: Policy, numbers: Any) -> View:
    new = tuple(
        Machine(
            id=f"new{next(numbers)}",
            zone=action.zone,
            purchase=action.purchase,
            state=MachineState.starting,
            created_at=NOW,
            bootstrap=policy.bootstrap,
        )
        for _ in range(action.count)
    )
    return replace(seen, machines=(*seen.machines, *new))


def _started(seen: View, action: Action, policy: Policy, numbers: Any) -> View:
    assert action.machine_id
    seen = _changed(seen, action, MachineState.running)
    return replace(
        seen,
        started={**seen.started, action.machine_id: NOW},
        drained=seen.drained - {action.machine_id},
        last_seen={k: v for k, v in seen.last_seen.items() if k != action.machine_id},
    )


def _told_to_drain(seen: View, action: Action, policy: Policy, numbers: Any) -> View:
    seats = tuple(
        replace(one, draining=True) if one.worker == action.worker else one for one in seen.seats
    )
    mine = [one for one in seats if one.machine_id == action.machine_id]
    assert action.machine_id
    drained = (
        seen.drained | {action.machine_id} if all(one.draining for one in mine) else seen.drained
    )
    return replace(seen, seats=seats, drained=drained)


def _stopped(seen: View, action: Action, policy: Policy, numbers: Any) -> View:
    assert action.machine_id
    seen = _changed(seen, action, MachineState.stopped)
    return replace(seen, stopped_since={**seen.stopped_since, action.machine_id: NOW})


def _terminated(seen: View, action: Action, policy: Policy, numbers: Any) -> View:
    return _changed(seen, action, MachineState.gone)


def _changed(seen: View, action: Action, state: MachineState) -> View:
    machines = tuple(
        replace(one, state=state) if one.id == action.machine_id else one for one in seen.machines
    )
    seats = seen.seats
    if state in (MachineState.stopped, MachineState.gone):
        seats = tuple(one for one in seats if one.machine_id != action.machine_id)
    return replace(seen, machines=machines, seats=seats)


_EFFECTS = {
    ActionKind.launch: _launched,
    ActionKind.start: _started,
    ActionKind.drain: _told_to_drain,
    ActionKind.stop: _stopped,
    ActionKind.terminate: _terminated,
}
