"""Decides what happens to the machines of one worker group. Pure: the same view, policy and time give the same plan.

What counts is who has checked in: a machine that exists but whose worker has not is on its way for `policy.boot`, and
worth nothing after that. A busy machine is never told to drain, stopped or terminated; an idle one is first told to drain,
and goes when it has. Nothing goes on account of a list that the cloud could not give. What is intended but not confirmed
counts: a launch as a machine, an end as a machine that is of no use but still there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta

from valohai_dagster.capacity.fleet import Fleet, Member
from valohai_dagster.capacity.model import (
    Action,
    ActionKind,
    Hold,
    Machine,
    Plan,
    Policy,
    Purchase,
    View,
)


def plan(view: View, policy: Policy, now: datetime) -> Plan:
    """E-05, E-07, L-14: enough machines for what waits and runs, within the limits; the rest goes after its grace."""
    fleet = Fleet(view, policy, now)
    going = list(_leaving(fleet))
    fleet.without({action.machine_id for action in going if action.machine_id})
    coming, shortfall = _growing(fleet)
    going += _shrinking(fleet)
    return Plan(actions=(*going, *coming), summary=fleet.summary, shortfall=shortfall)


# -- what has to go whatever waits ---------------------------------------------------------------------------------


def _leaving(fleet: Fleet) -> Iterator[Action]:
    """Those that never registered first."""
    if fleet.view.listed_at is None:
        return
    policy, free = fleet.policy, [one for one in fleet.members if not (one.busy or one.ending)]
    for one in free:
        if not one.registered and not one.in_time:
            yield _end(one.machine, f"no worker of it checked in within {span(policy.boot)} (E-07)")
    rest = max(0, policy.max_machines - len(fleet.stopped))  # so many more may be kept stopped
    for one in free:
        if not one.registered:
            continue
        if one.drained and all(seat.draining for seat in one.seats):
            action = _remove(fleet, one, "its workers have drained", rest=rest)
            rest -= action.kind is ActionKind.stop
            yield action
        elif _is_silent(fleet, one):
            yield _end(one.machine, f"its worker has been silent for {span(policy.silence)}")
    yield from _destroyed(fleet)


def _destroyed(fleet: Fleet) -> Iterator[Action]:
    for machine in fleet.stopped:
        since = fleet.view.stopped_since.get(machine.id)
        if not _is_current(fleet, machine):
            yield _end(machine, "stopped, and what it was started with is of an old version")
        elif since is not None and fleet.now - since >= fleet.policy.destroy_after:
            yield _end(
                machine, f"stopped for {span(fleet.policy.destroy_after)} without being needed"
            )


def _is_silent(fleet: Fleet, one: Member) -> bool:
    """Long enough that its work, if it had any, was given to others."""
    seen = [seat.seen_at for seat in one.seats]
    last = fleet.view.last_seen.get(one.id)
    seen += [last] if last is not None else []
    since = fleet.view.silent_since(max(seen, default=None))
    return not one.able and (since is None or fleet.now - since >= fleet.policy.silence)


def _is_current(fleet: Fleet, machine: Machine) -> bool:
    return fleet.policy.bootstrap in (None, machine.bootstrap)


def _remove(fleet: Fleet, one: Member, why: str, *, rest: int) -> Action:
    """Kept stopped where that is wanted and of use. The cloud takes spot machines for good."""
    policy, machine = fleet.policy, one.machine
    wanted = policy.stop_when_idle and policy.enabled and rest > 0
    useful = machine.purchase is Purchase.on_demand and machine.reclaimed_at is None
    if wanted and useful and not one.outdated and _is_current(fleet, machine):
        return Action(kind=ActionKind.stop, machine_id=machine.id, zone=machine.zone, reason=why)
    return _end(machine, why)


def _end(machine: Machine, why: str) -> Action:
    return Action(kind=ActionKind.terminate, machine_id=machine.id, zone=machine.zone, reason=why)


# -- more ----------------------------------------------------------------------------------------------------------


def _growing(fleet: Fleet) -> tuple[list[Action], str | None]:
    """What is to be launched or started, and why not all that waits can be served."""
    policy = fleet.policy
    lacking = max(0, -(-(fleet.waiting - fleet.capacity()) // fleet.slots))
    if not policy.enabled:
        return [], "the group is disabled" if fleet.waiting else None
    wanted = max(lacking, fleet.floor - fleet.serving)
    wanted = max(wanted, 1 if _renews(fleet) else 0)
    number = min(wanted, max(0, policy.max_machines - fleet.existing))
    actions = _starts(fleet, number)
    launches, held = _launches(fleet, number - len(actions))
    actions += launches
    if sum(action.count for action in actions) >= lacking:
        return actions, None
    return actions, held or f"the group has all {policy.max_machines} machines that it may have"


def _renews(fleet: Fleet) -> bool:
    """One machine that is kept has an old agent: its replacement comes before it goes, one at a time."""
    ready = [one for one in fleet.members if one.ready]
    settled = fleet.existing == len(ready)
    return settled and len(ready) <= fleet.floor and any(o.idle and o.outdated for o in ready)


def _starts(fleet: Fleet, number: int) -> list[Action]:
    """Stopped machines first: they are there, and their disks know the images and inputs."""
    free = [one for one in fleet.stopped if _hold(fleet, one.zone, one.purchase) is None]
    newest = sorted(free, key=lambda one: (one.created_at, one.id), reverse=True)
    reason = f"{_demand(fleet)}, and it is stopped and ready"
    return [
        Action(kind=ActionKind.start, machine_id=one.id, zone=one.zone, reason=reason)
        for one in newest[:number]
    ]


def _launches(fleet: Fleet, number: int) -> tuple[list[Action], str | None]:
    """Spread over the zones that are not held, fewest machines first. Also why nothing more can be tried."""
    if number <= 0:
        return [], None
    held: list[Hold] = []
    for purchase in _purchases(fleet.policy):
        zones = []
        for zone in fleet.policy.zones:
            hold = _hold(fleet, zone, purchase)
            if hold is None:
                zones.append(zone)
            else:
                held.append(hold)
        if zones:
            reason = _launch_reason(fleet, purchase)
            return [
                Action(kind=ActionKind.launch, count=n, zone=zone, purchase=purchase, reason=reason)
                for zone, n in _spread(fleet, zones, number).items()
            ], None
    first = min(held, key=lambda hold: hold.until)
    return [], f"{first.reason}; tried again at {first.until:%H:%M:%S} UTC"


def _spread(fleet: Fleet, zones: list[str], number: int) -> Counter[str]:
    """In equal numbers, the first zone of the settings before the others."""
    there = Counter(one.machine.zone for one in fleet.members)
    for (zone, _), count in fleet.asked.items():
        there[zone] += count
    counts: Counter[str] = Counter()
    for _ in range(number):
        zone = min(zones, key=lambda one: there[one] + counts[one])
        counts[zone] += 1
    return counts


def _purchases(policy: Policy) -> tuple[Purchase, ...]:
    if not policy.spot:
        return (Purchase.on_demand,)
    return (Purchase.spot, Purchase.on_demand) if policy.on_demand_fallback else (Purchase.spot,)


def _hold(fleet: Fleet, zone: str, purchase: Purchase) -> Hold | None:
    """The longest that stands in the way."""
    found = [
        hold
        for hold in fleet.view.holds
        if hold.until > fleet.now
        and hold.zone in (None, zone)
        and hold.purchase in (None, purchase)
    ]
    return max(found, key=lambda hold: hold.until, default=None)


def _launch_reason(fleet: Fleet, purchase: Purchase) -> str:
    fallback = fleet.policy.spot and purchase is Purchase.on_demand
    return _demand(fleet) + (", and there is no spot capacity" if fallback else "")


def _demand(fleet: Fleet) -> str:
    if fleet.waiting:
        return f"{fleet.waiting} waiting"
    return f"the group keeps {fleet.floor} machines"


# -- less ----------------------------------------------------------------------------------------------------------


def _shrinking(fleet: Fleet) -> Iterator[Action]:
    """Idle machines are told to drain: outdated ones first, then the newest, as far as what waits does not need them.

    Told again while they have not heard: the one that told them may have died before it could.
    """
    if fleet.view.listed_at is None:
        return
    for one in fleet.members:
        if one.drained and not one.ending and one.busy == 0:
            yield from _drain(one, "told to drain before, and has not heard yet")
    idle = sorted(
        (one for one in fleet.members if one.idle),
        key=lambda one: (one.outdated, one.machine.created_at, one.id),
        reverse=True,
    )
    allowance = _Allowance(fleet)
    for one in idle:
        why = allowance.take(one)
        if why is not None:
            yield from _drain(one, why)


class _Allowance:
    """How much may go at this moment. Counted with what has checked in: what is still to come may never."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, policy = fleet, fleet.policy
        ready = [one for one in fleet.members if one.ready]
        self._machines = len(ready) - fleet.floor
        self._slots = sum(one.free for one in ready) - fleet.waiting
        self._over = fleet.serving - policy.max_machines
        # Where there is no room for a replacement, an outdated one goes first, alone.
        full = fleet.existing == len(ready) >= policy.max_machines
        self._renewed = 1 if full else 0

    def take(self, one: Member) -> str | None:
        """Why this one goes; None when it has to stay."""
        why = self._why(one)
        if why is None:
            return None
        self._machines, self._slots = self._machines - 1, self._slots - one.free
        self._over -= 1
        return why

    def _why(self, one: Member) -> str | None:
        policy = self._fleet.policy
        if not policy.enabled:
            return "the group is disabled"
        if one.outdated:
            return "its agent is of an old version" if self._may_renew() else None
        if self._machines <= 0:
            return None
        if self._over > 0:
            return f"the group may have {policy.max_machines} machines"
        since = one.idle_since
        if since is None or self._fleet.now - since < policy.grace or one.free > self._slots:
            return None
        return f"idle for {span(policy.grace)}"

    def _may_renew(self) -> bool:
        if self._machines > 0:
            return True
        self._renewed -= 1
        return self._renewed >= 0


def _drain(one: Member, why: str) -> Iterator[Action]:
    for seat in one.able:
        yield Action(
            kind=ActionKind.drain,
            worker=seat.worker,
            machine_id=one.id,
            zone=one.machine.zone,
            reason=why,
        )


def span(time: timedelta) -> str:
    """A length of time for people: `90 s`, `15 min`, `1.5 h`."""
    seconds = time.total_seconds()
    if seconds <= 120:
        return f"{seconds:g} s"
    return f"{seconds / 60:g} min" if seconds <= 5400 else f"{seconds / 3600:g} h"
