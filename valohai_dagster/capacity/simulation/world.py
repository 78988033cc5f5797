"""One simulated world: a cloud, machines with workers, a queue, and a conductor that dies now and then.

The conductor looks when something has happened, when the last look said so, and every half minute, as the real one does.
It is a reconciler on a book; when it dies, at any point between its calls, a new one goes on with the same book.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Protocol

from valohai_dagster.capacity.clouds.base import Launch
from valohai_dagster.capacity.clouds.simulated_cloud import (
    ALIVE,
    SimulatedCloud,
    SimulatedMachine,
    Weather,
)
from valohai_dagster.capacity.look import Load, Outcome
from valohai_dagster.capacity.model import Machine, MachineState, Policy, Purchase
from valohai_dagster.capacity.reconcile import Reconciler
from valohai_dagster.capacity.simulation.book import MemoryBook
from valohai_dagster.capacity.simulation.crew import Crew, Worker
from valohai_dagster.capacity.simulation.scenario import START, Accident, Scenario, at
from valohai_dagster.capacity.simulation.timeline import Timeline

LOOK_EVERY = 30.0  # seconds
KICK_DELAY = 0.2  # seconds from an event to the look that it makes
NOTICE = 120.0  # seconds, of machines that are taken back
AFTERWARDS = 24 * 3600.0  # seconds in which everything has to come to its end
SPOT_PRICE = 0.3  # of a machine's hour on demand


class ConductorDied(Exception):
    """At this point, with nothing that came after."""


class Looks(Protocol):
    """What decides: the reconciler, or one to compare it with."""

    def step(self, load: Load, policy: Policy) -> Outcome: ...


MakeLooks = Callable[[Any, Any, "World"], Looks]  # driver, book, world


@dataclass(frozen=True, kw_only=True)
class Result:
    """`leaked`: machines that nothing will ever end. `lost`: jobs that never ended. `busy_terminated`: machines that were
    stopped or terminated by us with work on them. `over_maximum`: most machines alive above the maximum at a look.
    `below_minimum`: the group did not keep its machines when all was well. Hours are of machines, priced: one on demand
    is 1 an hour.
    """

    leaked: int
    lost: int
    busy_terminated: int
    over_maximum: int
    below_minimum: bool
    doubled: int
    waits: tuple[float, ...]
    cost: float
    machines: int
    looks: int
    deaths: int
    finished_at: float


class World:
    def __init__(self, scenario: Scenario, make: MakeLooks | None = None) -> None:
        self.scenario, self._make = scenario, make or reconciler
        self.timeline = Timeline()
        self.random = Random(scenario.seed + 1)  # noqa: S311
        self.cloud = SimulatedCloud(scenario.weather, clock=self.timeline.clock)
        self.driver = WorldDriver(self)
        self.book = MemoryBook()
        self.crew = Crew(self.timeline, self.kick)
        self.policy = scenario.policy
        self.busy_terminated, self.looks, self.deaths, self.over_maximum = 0, 0, 0, 0
        self._dying = scenario.conductor_deaths
        self._looks: Looks | None = None
        self._look_at: float | None = None
        self._looking = self._again = False
        self._booted: set[tuple[str, Any]] = set()
        self._preempted_at = 0.0
        self._watched_since = 0.0

    # -- from beginning to end -----------------------------------------------------------------------------------

    def run(self) -> Result:
        scenario, timeline = self.scenario, self.timeline
        for work in scenario.work:
            timeline.plan(work.arrives, lambda work=work: self.crew.arrive(work))
        for accident in scenario.accidents:
            timeline.plan(accident.at, lambda accident=accident: self._happens(accident))
        self._revive()
        self._chance_takes()
        end = scenario.hours * 3600
        timeline.run(end)
        self._sky_clears()
        timeline.run(end + AFTERWARDS, done=lambda: self.crew.finished)
        timeline.run(timeline.seconds + 2 * self.policy.boot.total_seconds() + 3600)
        finished_at = max((job.finished_at or 0.0 for job in self.crew.jobs), default=0.0)
        kept = len(self.crew.seats())
        below = kept < min(self.policy.min_machines, self.policy.max_machines)
        self.policy = replace(self.policy, enabled=False)
        self.kick()
        timeline.run(timeline.seconds + AFTERWARDS, done=self._empty)
        return self._result(below, finished_at)

    def _empty(self) -> bool:
        return not any(self.is_there(one) for one in self.cloud.machines.values())

    def is_there(self, machine: SimulatedMachine) -> bool:
        """It costs money."""
        state = machine.state(self.timeline.clock())
        return state not in (None, MachineState.terminating, MachineState.gone)

    def _sky_clears(self) -> None:
        weather = self.cloud.weather
        self.cloud.weather = Weather(
            seed=weather.seed,
            boot=(20, 60),
            listing_lag=weather.listing_lag,
            keeps_tokens=weather.keeps_tokens,
        )
        self._dying = 0.0

    # -- the conductor -------------------------------------------------------------------------------------------

    def kick(self) -> None:
        self._look(self.timeline.seconds + KICK_DELAY)

    def step_survives(self) -> None:
        """Every call of the conductor passes here."""
        if self._dying and self.random.random() < self._dying:
            raise ConductorDied

    def call_takes_time(self) -> None:
        """Of the conductor to the cloud: the world goes on meanwhile."""
        seconds = self.random.uniform(0, self.scenario.call_seconds)
        if seconds:
            self.timeline.run(self.timeline.seconds + seconds)

    def _look(self, when: float) -> None:
        if self._looks is None or (self._look_at is not None and self._look_at <= when):
            return
        self._look_at = when
        self.timeline.plan(when, lambda: self._look_now(when))

    def _look_now(self, when: float) -> None:
        looks = self._looks
        if looks is None or self._look_at != when:
            return
        self._look_at = None
        if when < self.crew.dark_until:
            self._watched_since = self.crew.dark_until
            self._look(self.crew.dark_until + KICK_DELAY)
            return
        if self._looking:  # it is still at the last one
            self._again = True
            return
        self.looks, self._looking = self.looks + 1, True
        load = Load(
            waiting=self.crew.waiting(),
            seats=self.crew.seats(),
            watched_since=at(self._watched_since),
        )
        try:
            outcome = looks.step(load, self.policy)
            self.step_survives()
        except ConductorDied:
            self._looks, self.deaths = None, self.deaths + 1
            self.timeline.after(self.random.uniform(1, 120), self._revive)
            return
        finally:
            self._looking = False
            self._machines_live()
        self._carry_out(outcome)
        if self._again:
            self._again = False
            self.kick()

    def _carry_out(self, outcome: Outcome) -> None:
        now = self.timeline.seconds
        for worker in outcome.drain:
            self.timeline.after(
                self.random.uniform(0.05, 2), lambda name=worker: self.crew.drain(name)
            )
        for machine in outcome.dead:
            self.crew.told_dead(machine)
        due = now + LOOK_EVERY
        if outcome.next_look is not None:
            due = min(due, (outcome.next_look - START).total_seconds())
        self._look(max(due, now + 1))

    def _revive(self) -> None:
        alive = _Mortal(self, self.driver), _Mortal(self, self.book)
        self._looks, self._look_at = self._make(*alive, self), None
        self._watched_since = self.timeline.seconds
        self.kick()

    # -- machines ------------------------------------------------------------------------------------------------

    def _machines_live(self) -> None:
        """New machines will boot, and there are never too many."""
        for machine in list(self.cloud.machines.values()):
            key = (machine.id, machine.boots_at)
            if machine.boots_at is not None and key not in self._booted:
                self._booted.add(key)
                when = (machine.boots_at - START).total_seconds()
                self.timeline.plan(when, lambda key=key: self._boots(*key))
        alive = sum(
            one.state(self.timeline.clock()) in ALIVE for one in self.cloud.machines.values()
        )
        self.over_maximum = max(self.over_maximum, alive - self.scenario.policy.max_machines)

    def _boots(self, machine_id: str, at_time: Any) -> None:
        machine = self.cloud.machines[machine_id]
        if machine.boots_at != at_time or machine.state(self.timeline.clock()) not in ALIVE:
            return
        slots = self.scenario.policy.slots // self.scenario.agents
        for number in range(self.scenario.agents):
            name = f"{machine_id}/{number}/{len(self._booted)}"
            worker = Worker(name=name, machine=machine_id, slots=slots)
            self.timeline.after(number * 3.0, lambda worker=worker: self._checks_in(worker))

    def _checks_in(self, worker: Worker) -> None:
        if self.timeline.seconds < self.crew.dark_until:
            self.timeline.plan(self.crew.dark_until, lambda: self._checks_in(worker))
        elif self.cloud.machines[worker.machine].state(self.timeline.clock()) in ALIVE:
            self.crew.check_in(worker)

    def ended_by_us(self, machine_id: str) -> None:
        """Called before the cloud does it."""
        if self.crew.busy(machine_id):
            self.busy_terminated += 1
        self.crew.die_on(machine_id)

    def _ends(self, machine_id: str) -> None:
        self.crew.die_on(machine_id)
        self.cloud.end(machine_id, after=self.random.uniform(0, 60))

    # -- accidents -----------------------------------------------------------------------------------------------

    def _happens(self, accident: Accident) -> None:
        clock = self.timeline.clock()
        if accident.kind == "blackout":
            self.crew.darken(accident.seconds)
            return
        up = [one for one in self.cloud.machines.values() if one.state(clock) in ALIVE]
        if accident.kind == "storm":
            up = [one for one in up if one.purchase is Purchase.spot and one.reclaimed_at is None]
        struck = [one.id for one in up if self.random.random() < accident.share]
        for machine_id in struck:
            if accident.kind == "storm":
                self._reclaim(machine_id)
            elif accident.kind == "crash":
                self._ends(machine_id)
            elif accident.kind == "agent-death":
                self.crew.die_on(machine_id)
            else:
                for worker in self.crew.on(machine_id):
                    self.crew.cut_off(worker, accident.seconds)

    def _reclaim(self, machine_id: str) -> None:
        """Most workers hear the notice, and take nothing new."""
        self.cloud.reclaim(machine_id, notice=NOTICE)
        for worker in self.crew.on(machine_id):
            if self.random.random() < 0.8:
                self.crew.drain(worker.name)
        self.timeline.after(NOTICE, lambda: self._ends(machine_id))

    def _chance_takes(self) -> None:
        now = self.timeline.seconds
        for machine_id in self.cloud.to_be_reclaimed(now - self._preempted_at):
            self._reclaim(machine_id)
        self._preempted_at = now
        if now < self.scenario.hours * 3600:
            self.timeline.after(60, self._chance_takes)

    # -- figures -------------------------------------------------------------------------------------------------

    def _result(self, below: bool, finished_at: float) -> Result:
        jobs, machines = self.crew.jobs, self.cloud.machines.values()
        return Result(
            leaked=sum(self.is_there(one) for one in machines),
            lost=sum(job.finished_at is None for job in jobs),
            busy_terminated=self.busy_terminated,
            over_maximum=self.over_maximum,
            below_minimum=below,
            doubled=self.crew.doubled,
            waits=tuple(
                job.started_at - job.work.arrives for job in jobs if job.started_at is not None
            ),
            cost=sum(price(one, until=at(finished_at)) for one in machines),
            machines=len(machines),
            looks=self.looks,
            deaths=self.deaths,
            finished_at=finished_at,
        )


def price(machine: SimulatedMachine, *, until: Any = None) -> float:
    """What it has cost when it is over: stopped hours are free. One that never ends has cost as much as till `until`."""
    total = 0.0
    ends = [since for since, _ in machine.history[1:]]
    for (since, state), end in zip(machine.history, [*ends, None], strict=True):
        if state in ALIVE or state is MachineState.stopping:
            total += max(0.0, ((end or max(until, since)) - since).total_seconds()) / 3600
    return total * (SPOT_PRICE if machine.purchase is Purchase.spot else 1.0)


def reconciler(driver: Any, book: Any, world: World) -> Looks:
    """The real one."""

    def prepare(launch: Launch) -> Launch:
        return replace(launch, tags={"valohai-bootstrap": world.policy.bootstrap or ""})

    def make_token() -> str:
        return f"{world.random.getrandbits(64):016x}"

    return Reconciler(
        "simulated",
        driver,
        book,
        prepare=prepare,
        clock=world.timeline.clock,
        make_token=make_token,
        seal=world.crew.seal,
    )


class _Mortal:
    """Passes calls on. The conductor may die before each of them and after it."""

    def __init__(self, world: World, target: Any) -> None:
        self._world, self._target = world, target

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            self._world.step_survives()
            answer = found(*args, **options)
            self._world.step_survives()
            return answer

        return call


class WorldDriver:
    """The simulated cloud as a driver, with workers on its machines that die with them."""

    kind = "simulated"

    def __init__(self, world: World) -> None:
        self._world = world
        self.can_stop = world.scenario.can_stop

    def check(self) -> Sequence[str]:
        return ()

    def list(self) -> Sequence[Machine]:
        self._world.call_takes_time()
        return self._world.cloud.list()

    def launch(self, launch: Launch) -> Sequence[str]:
        self._world.call_takes_time()
        return self._world.cloud.launch(launch)

    def terminate(self, machine_id: str) -> None:
        self._ending(machine_id, self._world.cloud.terminate)

    def stop(self, machine_id: str) -> None:
        self._ending(machine_id, self._world.cloud.stop)

    def start(self, machine_id: str) -> None:
        self._world.call_takes_time()
        self._world.crew.unseal(machine_id)
        self._world.cloud.start(machine_id)

    def protect(self, machine_id: str, *, on: bool) -> None:
        pass

    def close(self) -> None:
        pass

    def _ending(self, machine_id: str, call: Callable[[str], None]) -> None:
        """Its workers end with it, also if the answer gets lost."""
        world = self._world
        world.call_takes_time()
        before = world.cloud.machines.get(machine_id)
        try:
            call(machine_id)
        finally:
            if world.cloud.machines.get(machine_id) is not before:
                world.ended_by_us(machine_id)
