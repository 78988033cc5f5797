"""A group's view sorted for planning: which machines serve, which are on their way, and what all of them can take."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property

from valohai_dagster.capacity.model import (
    ActionKind,
    Machine,
    MachineState,
    Policy,
    Purchase,
    Seat,
    View,
)

ALIVE = frozenset({MachineState.starting, MachineState.running})
RESTS = frozenset({MachineState.stopping, MachineState.stopped})
ENDS = frozenset({ActionKind.stop, ActionKind.terminate})
BLINK = timedelta(seconds=60)  # an agent that restarts or updates itself is back by then


@dataclass(frozen=True, kw_only=True)
class Member:
    """A machine that runs or is about to, with the workers on it.

    `able`: those of `seats` that take jobs. `in_time`: workers of it are still expected to check in. `blinking`: one was
    there a moment ago. `drained`: its workers were all told to drain. `ending`: a call that ends it is under way.
    """

    machine: Machine
    seats: tuple[Seat, ...]
    able: tuple[Seat, ...]
    registered: bool
    in_time: bool
    blinking: bool
    drained: bool
    ending: bool

    @property
    def id(self) -> str:
        return self.machine.id

    @cached_property
    def busy(self) -> int:
        return sum(seat.busy for seat in self.seats)

    @property
    def booting(self) -> bool:
        """No worker has checked in, but there is still time."""
        return self.in_time and not self.registered

    @cached_property
    def stays(self) -> bool:
        """Nothing is known that will take it away."""
        return not (self.ending or self.drained or self.machine.reclaimed_at)

    @cached_property
    def ready(self) -> bool:
        """Workers of it take jobs now."""
        return self.stays and bool(self.able)

    @cached_property
    def serving(self) -> bool:
        """It takes jobs, or soon will."""
        return self.ready or (self.stays and not self.seats and (self.booting or self.blinking))

    @cached_property
    def idle(self) -> bool:
        """It could take jobs, and has none."""
        return self.ready and self.busy == 0

    @cached_property
    def outdated(self) -> bool:
        return any(seat.outdated for seat in self.seats)

    @cached_property
    def free(self) -> int:
        """Slots of workers that have checked in. Outdated ones are on their way out and not counted on."""
        if not self.ready or self.outdated:
            return 0
        return sum(max(0, seat.slots - seat.busy) for seat in self.able)

    def expected(self, slots: int) -> int:
        """Of the `slots` of a machine, those whose workers are still to check in."""
        here = self.booting or bool(self.seats)
        if not (self.stays and self.in_time and here) or len(self.able) < len(self.seats):
            return 0
        return max(0, slots - sum(seat.slots for seat in self.seats))

    @cached_property
    def idle_since(self) -> datetime | None:
        """Since when all its workers have had nothing to do."""
        times = [seat.idle_since for seat in self.seats if seat.busy == 0 and seat.idle_since]
        return max(times) if times and len(times) == len(self.seats) else None


class Fleet:
    """What there is, seen with the eyes of `policy` at `now`.

    `members`: machines that are alive; `stopped`: those at rest that may be started. `existing`: how many machines the
    group has or has asked for, whatever they are worth, as its maximum counts them.
    """

    def __init__(self, view: View, policy: Policy, now: datetime) -> None:
        self.view, self.policy, self.now = view, policy, now
        self.slots = max(1, policy.slots)
        self.waiting = sum(view.waiting.values())
        self._seats: dict[str, list[Seat]] = defaultdict(list)
        for seat in view.seats:
            self._seats[seat.machine_id].append(seat)
        self._ending = {i.machine_id for i in view.intents if i.action in ENDS}
        self._starting = {i.machine_id for i in view.intents if i.action is ActionKind.start}
        self.members = [self._member(machine) for machine in view.machines if self._is_up(machine)]
        self.stopped = [machine for machine in view.machines if self._is_at_rest(machine)]
        self.asked = self._asked_for()
        self.existing = len(self.members) + self.pending

    def without(self, ids: Collection[str]) -> None:
        """These are told to go now: they still exist, but are of no more use."""
        self.members = [one for one in self.members if one.id not in ids]
        self.stopped = [machine for machine in self.stopped if machine.id not in ids]

    @property
    def pending(self) -> int:
        """Machines that were asked for and are not listed yet."""
        return sum(self.asked.values())

    @property
    def floor(self) -> int:
        """Machines that are kept whatever there is to do."""
        policy = self.policy
        return min(policy.min_machines, policy.max_machines) if policy.enabled else 0

    @property
    def serving(self) -> int:
        """Machines that take jobs or soon will."""
        return sum(one.serving for one in self.members) + self.pending

    def capacity(self) -> int:
        """Slots that take what waits, now or soon."""
        listed = {machine.id for machine in self.view.machines}
        early = {name: seats for name, seats in self._seats.items() if name not in listed}
        seats = [seat for group in early.values() for seat in group if self._is_able(seat)]
        checked_in = sum(max(0, seat.slots - seat.busy) for seat in seats)
        coming = max(0, self.pending - sum(1 for name in early if name)) * self.slots
        known = sum(one.free + one.expected(self.slots) for one in self.members)
        return known + checked_in + coming

    @property
    def summary(self) -> str:
        """One line on the group as a whole."""
        states = Counter(_state(one) for one in self.members)
        seen = ", ".join(f"{number} {word}" for word, number in sorted(states.items())) or "none"
        stopped = f", {len(self.stopped)} stopped" if self.stopped else ""
        asked = f", {self.pending} asked for" if self.pending else ""
        return f"{self.waiting} waiting; machines: {seen}{stopped}{asked}"

    def _is_up(self, machine: Machine) -> bool:
        """One that is being started counts, whatever an old list still says."""
        woken = machine.state in RESTS and machine.id in self._starting
        return machine.state in ALIVE or woken

    def _is_at_rest(self, machine: Machine) -> bool:
        changing = machine.id in self._ending or machine.id in self._starting
        return machine.state is MachineState.stopped and not changing

    def _is_able(self, seat: Seat) -> bool:
        return not seat.draining and self.now - seat.seen_at < BLINK

    def _asked_for(self) -> Counter[tuple[str, Purchase]]:
        """By zone and purchase. What is listed under the launch's token has come."""
        listed = Counter(machine.token for machine in self.view.machines if machine.token)
        asked: Counter[tuple[str, Purchase]] = Counter()
        for intent in self.view.intents:
            if intent.action is ActionKind.launch:
                missing = max(0, intent.count - listed[intent.token])
                asked[intent.zone, intent.purchase] += missing
        return asked

    def _member(self, machine: Machine) -> Member:
        view, now = self.view, self.now
        seats = tuple(self._seats.get(machine.id, ()))
        started, seen = view.started.get(machine.id), view.last_seen.get(machine.id)
        known = machine.id in view.registered
        if started is not None:  # what it was before its stop does not count
            known = known and seen is not None and seen > started
        woken = machine.id in self._starting
        silent = view.silent_since(seen)
        boots = now - (started or machine.created_at) < self.policy.boot
        heard = view.watched_since is None or now - view.watched_since >= BLINK
        return Member(
            machine=machine,
            seats=seats,
            able=tuple(seat for seat in seats if self._is_able(seat)),
            registered=(known or bool(seats)) and not woken,
            in_time=woken or boots or not heard,
            blinking=known and not seats and silent is not None and now - silent < BLINK,
            drained=machine.id in view.drained and not woken,
            ending=machine.id in self._ending,
        )


def _state(one: Member) -> str:
    if one.busy:
        return "busy"
    if one.ending or one.drained:
        return "going"
    return "idle" if one.able else "starting" if one.booting else "silent"
