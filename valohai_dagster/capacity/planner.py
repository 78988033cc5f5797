"""Decides what happens to the machines of one worker group. Pure: the same view, policy and time give the same plan.

What counts is who has checked in: a machine that exists but whose worker has not is on its way for `policy.boot`, and
worth nothing after that. A busy machine is never stopped or terminated; an idle one is first told to drain, and goes when
it has. Nothing is terminated on account of a list that the cloud could not give.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from valohai_dagster.capacity.model import (
    Action,
    ActionKind,
    Hold,
    Machine,
    MachineState,
    Plan,
    Policy,
    Purchase,
    Seat,
    View,
)

ALIVE = frozenset({MachineState.starting, MachineState.running})


def plan(view: View, policy: Policy, now: datetime) -> Plan:
    """E-05, E-07, L-14: enough machines for what waits and runs, within the limits; the rest goes after its grace."""
    group = _Group(view, policy, now)
    going = list(_leaving(group))
    gone = {action.machine_id for action in going}
    fleet = [one for one in group.members if one.machine.id not in gone]
    coming, shortfall = _growing(group, fleet)
    if not coming:
        going += _shrinking(group, fleet)
    return Plan(actions=(*going, *coming), summary=_summary(group), shortfall=shortfall)


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A machine that runs or is about to, with the workers on it."""

    machine: Machine
    seats: tuple[Seat, ...]
    registered: bool
    booting: bool
    draining: bool

    @property
    def busy(self) -> int:
        return sum(seat.busy for seat in self.seats)

    @property
    def serving(self) -> bool:
        """It takes jobs, or soon will."""
        able = any(not seat.draining for seat in self.seats)
        return self.machine.reclaimed_at is None and not self.draining and (able or self.booting)

    def free(self, slots: int) -> int:
        """Slots of which `slots` are expected of a machine that has not checked in yet."""
        if not self.serving:
            return 0
        if not self.seats:
            return slots
        return sum(max(0, seat.slots - seat.busy) for seat in self.seats if not seat.draining)

    @property
    def idle_since(self) -> datetime | None:
        """Since when all its workers have had nothing to do."""
        times = [seat.idle_since for seat in self.seats if seat.busy == 0]
        if not self.seats or len(times) < len(self.seats) or None in times:
            return None
        return max(time for time in times if time is not None)

    @property
    def outdated(self) -> bool:
        return any(seat.outdated for seat in self.seats)


class _Group:
    """A view, sorted."""

    def __init__(self, view: View, policy: Policy, now: datetime) -> None:
        self.view, self.policy, self.now = view, policy, now
        seats: dict[str, list[Seat]] = defaultdict(list)
        for seat in view.seats:
            seats[seat.machine_id].append(seat)
        self.members = [
            self._member(machine, tuple(seats[machine.id]))
            for machine in view.machines
            if machine.state in ALIVE
        ]
        self.stopped = [one for one in view.machines if one.state is MachineState.stopped]
        listed = Counter(machine.token for machine in view.machines if machine.token)
        self.pending = sum(
            max(0, intent.count - listed[intent.token])
            for intent in view.intents
            if intent.action is ActionKind.launch
        )
        self.waiting = sum(view.waiting.values())

    def _member(self, machine: Machine, seats: tuple[Seat, ...]) -> _Member:
        registered = machine.id in self.view.registered or bool(seats)
        return _Member(
            machine=machine,
            seats=seats,
            registered=registered,
            booting=not registered and self.now - machine.created_at < self.policy.boot,
            draining=machine.id in self.view.drained,
        )


# -- what has to go whatever waits ---------------------------------------------------------------------------------


def _leaving(group: _Group) -> Iterator[Action]:
    if group.view.listed_at is None:
        return
    policy, now = group.policy, group.now
    for one in group.members:
        if one.busy:
            continue
        if one.draining and all(seat.draining for seat in one.seats):
            yield _remove(group, one, "its workers have drained")
        elif not one.registered and not one.booting:
            yield _end(one.machine, f"no worker of it checked in within {policy.boot} (E-07)")
        elif one.registered and not one.seats and _silent_since(group, one.machine):
            yield _end(one.machine, f"its worker has been silent for more than {policy.silence}")
    for machine in group.stopped:
        since = group.view.stopped_since.get(machine.id)
        if since is not None and now - since >= policy.destroy_after:
            yield _end(machine, f"stopped for {policy.destroy_after} without being needed")


def _silent_since(group: _Group, machine: Machine) -> bool:
    seen = group.view.last_seen.get(machine.id)
    return seen is None or group.now - seen >= group.policy.silence


def _remove(group: _Group, one: _Member, why: str) -> Action:
    """Idle machines are kept stopped where that is wanted; outdated ones are of no use later."""
    policy = group.policy
    if policy.stop_when_idle and policy.enabled and not one.outdated:
        return Action(kind=ActionKind.stop, machine_id=one.machine.id, reason=why)
    return _end(one.machine, why)


def _end(machine: Machine, why: str) -> Action:
    return Action(kind=ActionKind.terminate, machine_id=machine.id, reason=why)


# -- more ----------------------------------------------------------------------------------------------------------


def _growing(group: _Group, fleet: Sequence[_Member]) -> tuple[list[Action], str | None]:
    policy = group.policy
    slots = max(1, policy.slots)
    free = sum(one.free(slots) for one in fleet) + group.pending * slots
    lacking = max(0, -(-(group.waiting - free) // slots))
    serving = sum(one.serving for one in fleet) + group.pending
    wanted = max(lacking, policy.min_machines - serving)
    if wanted <= 0:
        return [], None
    if not policy.enabled:
        return [], "the group is disabled" if lacking else None
    room = policy.max_machines - len(fleet) - group.pending
    number = min(wanted, max(0, room))
    actions = _starts(group, number)
    launches, held = _launches(group, fleet, number - len(actions))
    actions += launches
    shortfall = None
    if sum(action.count for action in actions) < lacking:
        shortfall = held or f"all {policy.max_machines} machines that the group may have are in use"
    return actions, shortfall


def _starts(group: _Group, number: int) -> list[Action]:
    """Stopped machines first: they are there, and their disks know the images and inputs."""
    newest = sorted(group.stopped, key=lambda one: one.created_at, reverse=True)
    reason = f"{group.waiting} waiting, and it is stopped and ready"
    return [
        Action(kind=ActionKind.start, machine_id=one.id, zone=one.zone, reason=reason)
        for one in newest[:number]
        if one.bootstrap == group.policy.bootstrap or group.policy.bootstrap is None
    ]


def _launches(
    group: _Group, fleet: Sequence[_Member], number: int
) -> tuple[list[Action], str | None]:
    """Spread over the zones that are not held, fewest machines first. Also why nothing more can be tried."""
    if number <= 0:
        return [], None
    in_zone = Counter(one.machine.zone for one in fleet)
    held: list[Hold] = []
    for purchase in _purchases(group.policy):
        zones = []
        for zone in group.policy.zones:
            hold = _hold(group, zone, purchase)
            if hold is None:
                zones.append(zone)
            else:
                held.append(hold)
        if zones:
            counts: Counter[str] = Counter()
            for _ in range(number):
                zone = min(zones, key=lambda one: (in_zone[one] + counts[one], zones.index(one)))
                counts[zone] += 1
            reason = _launch_reason(group, purchase)
            return [
                Action(kind=ActionKind.launch, count=n, zone=zone, purchase=purchase, reason=reason)
                for zone, n in counts.items()
            ], None
    first = min(held, key=lambda hold: hold.until)
    return [], f"{first.reason}; tried again at {first.until:%H:%M:%S} UTC"


def _purchases(policy: Policy) -> tuple[Purchase, ...]:
    if not policy.spot:
        return (Purchase.on_demand,)
    return (Purchase.spot, Purchase.on_demand) if policy.on_demand_fallback else (Purchase.spot,)


def _hold(group: _Group, zone: str, purchase: Purchase) -> Hold | None:
    """The longest that stands in the way."""
    found = [
        hold
        for hold in group.view.holds
        if hold.until > group.now
        and hold.zone in (None, zone)
        and hold.purchase in (None, purchase)
    ]
    return max(found, key=lambda hold: hold.until, default=None)


def _launch_reason(group: _Group, purchase: Purchase) -> str:
    if not group.waiting:
        return f"the group keeps {group.policy.min_machines} machines"
    fallback = group.policy.spot and purchase is Purchase.on_demand
    return f"{group.waiting} waiting" + (", and there is no spot capacity" if fallback else "")


# -- less ----------------------------------------------------------------------------------------------------------


def _shrinking(group: _Group, fleet: Sequence[_Member]) -> Iterator[Action]:
    """Idle machines are told to drain: outdated ones first, then the newest. Nothing goes while something waits."""
    policy = group.policy
    if group.waiting and policy.enabled:
        return
    serving = [one for one in fleet if one.serving]
    idle = [one for one in serving if one.idle_since is not None]
    idle.sort(key=lambda one: (one.outdated, one.machine.created_at), reverse=True)
    floor = policy.min_machines if policy.enabled else 0
    spare, over = len(serving) - floor, len(fleet) + group.pending - policy.max_machines
    for one in idle:
        why = _why_spare(group, one, over=over)
        if why is None:
            continue
        if spare <= 0 and not one.outdated:
            break
        spare, over = spare - 1, over - 1
        for seat in one.seats:
            if not seat.draining:
                yield Action(
                    kind=ActionKind.drain,
                    worker=seat.worker,
                    machine_id=one.machine.id,
                    reason=why,
                )


def _why_spare(group: _Group, one: _Member, *, over: int) -> str | None:
    policy, since = group.policy, one.idle_since
    assert since is not None
    if not policy.enabled:
        return "the group is disabled"
    if one.outdated:
        return "its agent is of an old version"
    if over > 0:
        return f"the group may have {policy.max_machines} machines"
    if group.now - since >= policy.grace:
        return f"idle for {policy.grace}"
    return None


def _summary(group: _Group) -> str:
    states = Counter(
        "busy" if one.busy else "idle" if one.seats else "starting" for one in group.members
    )
    seen = ", ".join(f"{number} {word}" for word, number in sorted(states.items())) or "none"
    stopped = f", {len(group.stopped)} stopped" if group.stopped else ""
    return f"{group.waiting} waiting; machines: {seen}{stopped}, {group.pending} asked for"
