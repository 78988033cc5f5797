"""A cloud that is not there: machines, zones and an API that misbehaves as often as it is told to. Pure.

Seeded, with the clock passed in: the same calls at the same times give the same answers. `SimulatedDriver` puts agents of
this host on its machines; the simulation, and tests of your own, put made-up workers on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from hashlib import sha256
from random import Random
from typing import Any

from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble
from valohai_dagster.capacity.model import Machine, MachineState, Purchase

ALIVE = frozenset({MachineState.starting, MachineState.running})
OVER = frozenset({MachineState.terminating, MachineState.gone})
_LISTED_AFTER_END = timedelta(seconds=60)
_REFUSALS = {
    Trouble.quota: "may have no more machines: the quota of the account is reached",
    Trouble.invalid: "does not know the image",
}


@dataclass(frozen=True, kw_only=True)
class Spell:
    """Of bad weather, from `start` until `end`. For droughts: in one zone or all, for one way of buying or both."""

    start: datetime
    end: datetime
    zone: str | None = None
    purchase: Purchase | None = None

    def holds(self, now: datetime) -> bool:
        return self.start <= now < self.end


@dataclass(frozen=True, kw_only=True)
class Weather:
    """How the cloud behaves. Rates are chances from 0 to 1 of each call or machine; times are in seconds.

    `lost_answer_rate`: calls that have their effect and fail all the same. `partial_rate`: launches that give
    only some of their machines, and no capacity for the others. `silent_failure_rate`: launches that are accepted and never give a machine. `listing_lag`: how
    old a list may be at most; a later list may be older. `delivery`: until an accepted launch makes its machines. `refuses`: troubles of all launches, `credentials` of all
    calls.
    """

    seed: int = 0
    boot: tuple[float, float] = (5.0, 5.0)
    delivery: tuple[float, float] = (0.0, 0.0)
    capacity_error_rate: float = 0.0
    throttle_rate: float = 0.0
    lost_answer_rate: float = 0.0
    partial_rate: float = 0.0
    silent_failure_rate: float = 0.0
    never_registers_rate: float = 0.0
    preemption_rate_per_hour: float = 0.0
    listing_lag: float = 0.0
    keeps_tokens: bool = True
    droughts: Sequence[Spell] = ()
    outages: Sequence[Spell] = ()
    refuses: frozenset[Trouble] = frozenset()


@dataclass(frozen=True, kw_only=True)
class SimulatedMachine:
    """`boots_at`: when its agent starts, None if it never does. `history`: its states and since when."""

    id: str
    token: str
    zone: str
    purchase: Purchase
    created_at: datetime
    boots_at: datetime | None
    reclaimed_at: datetime | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    bootstrap: str | None = None
    history: tuple[tuple[datetime, MachineState], ...] = ()

    def state(self, at: datetime) -> MachineState | None:
        """None before it was made."""
        found = None
        for since, state in self.history:
            if since <= at:
                found = state
        return found

    def then(self, at: datetime, state: MachineState) -> SimulatedMachine:
        """From `at` on; what was to come after that does not."""
        kept = tuple(one for one in self.history if one[0] <= at)
        return replace(self, history=(*kept, (at, state)))

    @property
    def ended_at(self) -> datetime | None:
        return next((at for at, state in self.history if state is MachineState.gone), None)


class SimulatedCloud:
    """One group's machines, and the API that makes and ends them."""

    def __init__(
        self, weather: Weather, *, clock: Callable[[], datetime], group: str = "simulated"
    ) -> None:
        self.weather, self._clock, self.group = weather, clock, group
        self._random = Random(weather.seed)  # noqa: S311
        self.machines: dict[str, SimulatedMachine] = {}
        self.asked: dict[str, int] = {}  # by token: how many were given or promised

    # -- what users of the API see ---------------------------------------------------------------------------------

    def list(self) -> list[Machine]:
        """As old as the weather wants it, and each time differently so."""
        self._gate()
        lag = self._random.uniform(0, self.weather.listing_lag)
        at = self._clock() - timedelta(seconds=lag)
        found = (self._listed(one, at) for one in self.machines.values())
        return [machine for machine in found if machine is not None]

    def launch(self, launch: Launch) -> list[str]:
        """Ids of what was made at once. One token gives no more than one launch."""
        lost = self._gate(changes=True)
        given = self.asked.get(launch.token, 0)
        missing = launch.count - given
        refused = self._grant(launch, missing) if missing > 0 else None
        ids = [one.id for one in self.machines.values() if one.token == launch.token]
        self._answer(lost)
        now = self._clock()
        ids = [one for one in ids if self.machines[one].created_at <= now]
        if refused is not None:
            refused.made = ids
            raise refused
        return ids

    def terminate(self, machine_id: str) -> None:
        lost = self._gate(changes=True)
        if machine_id not in self.machines:
            raise self._unknown(machine_id)
        self.end(machine_id, after=self._random.uniform(0, 30))
        self._answer(lost)

    def stop(self, machine_id: str) -> None:
        lost = self._gate(changes=True)
        machine, now = self._existing(machine_id), self._clock()
        if machine.state(now) in ALIVE:
            later = now + timedelta(seconds=self._random.uniform(1, 30))
            machine = machine.then(now, MachineState.stopping).then(later, MachineState.stopped)
            self.machines[machine_id] = replace(machine, boots_at=None)
        self._answer(lost)

    def start(self, machine_id: str) -> None:
        lost = self._gate(changes=True)
        machine, now = self._existing(machine_id), self._clock()
        if machine.state(now) is not MachineState.stopped:
            if machine.state(now) in ALIVE:
                return
            raise self._no(
                "IncorrectInstanceState", Trouble.invalid, f"cannot start {machine_id} just now"
            )
        self._check_capacity(machine.zone, machine.purchase)
        boots = self._boots(now)
        machine = machine.then(now, MachineState.starting)
        machine = machine.then(now + timedelta(seconds=2), MachineState.running)
        self.machines[machine_id] = replace(machine, boots_at=boots)
        self._answer(lost)

    # -- what happens to machines ------------------------------------------------------------------------------

    def end(self, machine_id: str, *, after: float = 0.0) -> None:
        """It stops running now, and is gone `after` seconds. Nothing happens to one that is over."""
        machine, now = self.machines.get(machine_id), self._clock()
        if machine is None or machine.state(now) in (None, *OVER):
            return
        gone = now + timedelta(seconds=after)
        machine = machine.then(now, MachineState.terminating).then(gone, MachineState.gone)
        self.machines[machine_id] = replace(machine, boots_at=None)

    def reclaim(self, machine_id: str, *, notice: float) -> None:
        """The cloud says that it takes a spot machine back in `notice` seconds; `end` is up to the caller."""
        at = self._clock() + timedelta(seconds=notice)
        self.machines[machine_id] = replace(self.machines[machine_id], reclaimed_at=at)

    def to_be_reclaimed(self, seconds: float) -> list[str]:
        """Spot machines that chance takes back now, `seconds` having passed since it was asked last."""
        chance = 1 - (1 - min(0.999, self.weather.preemption_rate_per_hour / 3600)) ** seconds
        now = self._clock()
        return [
            one.id
            for one in self.machines.values()
            if one.purchase is Purchase.spot
            and one.reclaimed_at is None
            and one.state(now) in ALIVE
            and self._random.random() < chance
        ]

    # -- within ------------------------------------------------------------------------------------------------

    def _gate(self, *, changes: bool = False) -> bool:
        """Raises what the weather does to a call. True if it has its effect but its answer gets lost."""
        now, weather, chance = self._clock(), self.weather, self._random
        lost = changes and chance.random() < weather.lost_answer_rate
        if any(spell.holds(now) for spell in weather.outages):
            if not (changes and chance.random() < 0.2):
                raise self._no_answer()
            lost = True
        if chance.random() < weather.throttle_rate:
            raise self._no(
                "RequestLimitExceeded",
                Trouble.throttled,
                "gets too many calls, and asks to wait a little",
                retry_after=float(chance.randint(1, 10)),
            )
        if Trouble.credentials in weather.refuses:
            raise self._no("AuthFailure", Trouble.credentials, "does not know these credentials")
        return lost

    def _answer(self, lost: bool) -> None:
        if lost:
            raise self._no_answer()

    def _existing(self, machine_id: str) -> SimulatedMachine:
        machine = self.machines.get(machine_id)
        if machine is None or machine.state(self._clock()) in OVER:
            raise self._unknown(machine_id)
        return machine

    def _unknown(self, machine_id: str) -> CloudError:
        return self._no(
            "InvalidInstanceID.NotFound", Trouble.invalid, f"has no machine {machine_id}"
        )

    def _grant(self, launch: Launch, missing: int) -> CloudError | None:
        """Raises when nothing is given; the answer is why not all."""
        chance, weather = self._random, self.weather
        for trouble in sorted(weather.refuses):
            raise self._no(trouble.value, trouble, _REFUSALS.get(trouble, "refuses all launches"))
        self._check_capacity(launch.zone, launch.purchase)
        if chance.random() < weather.silent_failure_rate:
            self.asked[launch.token] = launch.count
            return None
        given = missing
        if missing > 1 and chance.random() < weather.partial_rate:
            given = chance.randint(1, missing - 1)
        for _ in range(given):
            self._make(launch, at_once=given < missing)
        self.asked[launch.token] = self.asked.get(launch.token, 0) + given
        return self._no_capacity(launch.zone, launch.purchase) if given < missing else None

    def _check_capacity(self, zone: str, purchase: Purchase) -> None:
        now = self._clock()
        drought = any(
            spell.holds(now) and spell.zone in (None, zone) and spell.purchase in (None, purchase)
            for spell in self.weather.droughts
        )
        if drought or self._random.random() < self.weather.capacity_error_rate:
            raise self._no_capacity(zone, purchase)

    def _make(self, launch: Launch, *, at_once: bool) -> None:
        now, chance = self._clock(), self._random
        made = now
        if not at_once:
            made += timedelta(seconds=chance.uniform(*self.weather.delivery))
        runs = made + timedelta(seconds=2)
        number = sum(one.token == launch.token for one in self.machines.values())
        name = f"{self.group}/{launch.token}/{number}"  # unlike those of other processes, too
        machine_id = f"sim-{sha256(name.encode()).hexdigest()[:12]}"
        self.machines[machine_id] = SimulatedMachine(
            id=machine_id,
            token=launch.token,
            zone=launch.zone,
            purchase=launch.purchase,
            created_at=made,
            boots_at=self._boots(made),
            tags=dict(launch.tags),
            bootstrap=launch.tags.get("valohai-bootstrap"),
            history=((made, MachineState.starting), (runs, MachineState.running)),
        )

    def _boots(self, since: datetime) -> datetime | None:
        if self._random.random() < self.weather.never_registers_rate:
            return None
        return since + timedelta(seconds=self._random.uniform(*self.weather.boot))

    def _listed(self, one: SimulatedMachine, at: datetime) -> Machine | None:
        state, ended = one.state(at), one.ended_at
        if state is None or (ended is not None and at - ended > _LISTED_AFTER_END):
            return None
        return Machine(
            id=one.id,
            zone=one.zone,
            purchase=one.purchase,
            state=state,
            created_at=one.created_at,
            token=one.token if self.weather.keeps_tokens else None,
            bootstrap=one.bootstrap,
            reclaimed_at=one.reclaimed_at,
        )

    def _no_answer(self) -> CloudError:
        return self._no("ServiceUnavailable", Trouble.outage, "did not answer")

    def _no_capacity(self, zone: str, purchase: Purchase) -> CloudError:
        place = f" in zone {zone}" if zone else ""
        return self._no(
            "InsufficientInstanceCapacity",
            Trouble.capacity,
            f"has no {purchase.value} capacity{place} just now",
            zone=zone or None,
            purchase=purchase,
        )

    def _no(self, code: str, trouble: Trouble, what: str, **about: Any) -> CloudError:
        return CloudError(
            f"the cloud of group {self.group} {what}", code=code, trouble=trouble, **about
        )
