"""The real reconciler on every driver: machines come for what waits, once, and all of them go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import count

import pytest

from tests.support.clock import FakeClock
from tests.support.clouds.rig import GROUP, Rig
from valohai_dagster.capacity.book import Kind
from valohai_dagster.capacity.clouds.base import Driver, Launch, Trouble
from valohai_dagster.capacity.look import Load, Outcome
from valohai_dagster.capacity.model import Policy, Seat
from valohai_dagster.capacity.reconcile import Reconciler
from valohai_dagster.capacity.simulation.book import MemoryBook

GRACE = timedelta(minutes=2)
TICK = 60.0  # seconds between looks


class Died(BaseException):
    """The process ends here."""


class Watched:
    """A group and what there is to do in it. Its clock begins now, as the machines' times are real, and is moved on."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.book = rig, MemoryBook()
        self.clock = FakeClock(datetime.now(timezone.utc))
        self.policy = Policy(max_machines=3, zones=tuple(rig.zones) or ("",), grace=GRACE)
        self.waiting = 0
        self.seats: dict[str, Seat] = {}
        self._tokens = (f"token-{number}" for number in count())
        self.take_over()

    def take_over(self, launch: Callable[[Driver, Launch], None] | None = None) -> None:
        """Another process looks after the group; `launch` stands between it and its driver."""
        driver = self.rig.driver(zones=list(self.rig.zones))
        if launch is not None:
            real = driver.launch

            def between(wanted: Launch) -> list[str]:
                ids = list(real(wanted))
                launch(driver, wanted)
                return ids

            driver.launch = between  # pyright: ignore[reportAttributeAccessIssue]
        self.reconciler = Reconciler(
            GROUP,
            driver,
            self.book,
            prepare=lambda wanted: wanted,
            clock=self.clock,
            make_token=lambda: next(self._tokens),
        )

    def look(self) -> Outcome:
        self.clock.advance(TICK)
        load = Load(
            waiting={0: self.waiting} if self.waiting else {}, seats=tuple(self.seats.values())
        )
        outcome = self.reconciler.step(load, self.policy)
        self.rig.settle()
        for worker in outcome.drain:
            del self.seats[worker]  # it is idle: it finishes, and goes
        return outcome

    def machines(self) -> list[str]:
        return sorted(one.machine.id for one in self.book.machines())

    def check_in(self, *, busy: int) -> None:
        """The workers of all machines; those that are not busy have just become idle."""
        for machine_id in self.machines():
            self.seats[machine_id] = Seat(
                worker=machine_id,
                machine_id=machine_id,
                busy=busy,
                idle_since=None if busy else self.clock(),
                seen_at=self.clock(),
            )

    def look_until(self, done: Callable[[], bool], *, looks: int) -> None:
        for _ in range(looks):
            if done():
                return
            self.look()
        assert done(), (self.machines(), self.book.intents(), self.book.history)


@pytest.fixture
def group(rig: Rig) -> Watched:
    return Watched(rig)


def test_machines_come_for_jobs_stay_while_busy_and_go_after_their_grace(
    group: Watched, rig: Rig
) -> None:
    group.waiting = 2
    group.look()
    group.look_until(lambda: not group.book.intents(), looks=5)
    machines = group.machines()
    assert len(machines) == 2
    group.waiting = 0
    for _ in range(4):  # longer than the grace
        group.check_in(busy=1)
        assert group.look().decisions == ()
    group.check_in(busy=0)
    group.look_until(lambda: not group.machines(), looks=40)
    assert not any(rig.alive(one) for one in machines)
    assert group.book.intents() == []


def test_a_process_that_dies_after_the_clouds_answer_leaves_no_second_machine(
    group: Watched, rig: Rig
) -> None:
    def die(_driver: Driver, _wanted: Launch) -> None:
        raise Died

    group.waiting = 1
    group.take_over(die)
    with pytest.raises(Died):
        group.look()
    group.take_over()
    group.look()
    group.look_until(lambda: not group.book.intents(), looks=5)
    (machine_id,) = group.machines()
    assert rig.alive(machine_id)
    assert [one.id for one in rig.driver().list()] == [machine_id]


def test_a_refusal_is_told_to_those_who_wait_and_clears_itself(group: Watched, rig: Rig) -> None:
    group.waiting = 1
    with rig.refuse(Trouble.quota):
        told = group.look().trouble
    assert told is not None
    assert GROUP in told
    group.look_until(lambda: bool(group.machines()), looks=60)
    group.look_until(lambda: not group.book.intents(), looks=5)
    assert group.look().trouble is None
    assert len(group.machines()) == 1


def test_a_launch_that_is_filled_in_part_is_made_up_for_elsewhere_or_later_and_never_twice(
    group: Watched, rig: Rig
) -> None:
    group.policy = replace(group.policy, zones=group.policy.zones[:2])  # two machines in the first
    group.waiting = group.policy.max_machines
    told = None
    with rig.refuse(Trouble.capacity, zone=next(iter(rig.zones), None), room=1):
        for _ in range(3):
            told = told or group.look().trouble
            assert len(rig.driver().list()) <= group.policy.max_machines
        if rig.zones:
            assert len(group.machines()) == group.policy.max_machines
        else:
            assert len(group.machines()) == 1
            assert told is not None
    words = [text for kind, text, _ in group.book.history if kind is Kind.trouble]
    assert any(GROUP in text for text in words), words
    group.look_until(lambda: len(group.machines()) == group.policy.max_machines, looks=60)
    group.look_until(lambda: not group.book.intents(), looks=5)
    assert len(rig.driver().list()) == group.policy.max_machines
