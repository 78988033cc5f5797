"""Machines on which calls have no effect, or that the cloud does not list although they live. A book in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import count
from typing import Any

import pytest

from tests.support.clock import FakeClock
from tests.support.small_cloud import SmallCloud
from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.book import Kind, Known
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble
from valohai_dagster.capacity.clouds.refusals import Refusals
from valohai_dagster.capacity.look import Load, Outcome
from valohai_dagster.capacity.model import Machine, MachineState, Policy, Seat
from valohai_dagster.capacity.reconcile import Reconciler
from valohai_dagster.capacity.simulation.book import MemoryBook

POLICY = Policy(max_machines=3, stop_when_idle=True, destroy_after=timedelta(days=1))


class OddCloud(SmallCloud):
    """Accepts starts and does nothing; refuses ends when told to; lists what it is told to."""

    may_end = may_start = True
    room = True  # else launches are accepted, and withdrawn by `withdraw`
    shown: dict[str, MachineState | None]  # what lists say of a machine instead of the truth
    ahead = timedelta(0)  # its clock, of ours

    def __init__(self) -> None:
        super().__init__()
        self.shown = {}
        self.refusals: Refusals | None = None

    def start(self, machine_id: str) -> None:
        self.calls.append(("start", machine_id))
        if not self.may_start:
            raise CloudError("no room to start", code="Full", trouble=Trouble.capacity)

    def launch(self, launch: Launch) -> Sequence[str]:
        if self.refusals is not None:
            self.refusals.raise_kept(launch.zone, launch.purchase)
        ids = super().launch(launch)
        if not self.room:
            for one in ids:
                self.machines[one] = replace(self.machines[one], state=MachineState.starting)
        return ids

    def withdraw(self) -> None:
        """What was launched ends; what was ending is forgotten."""
        for name, one in list(self.machines.items()):
            if one.state is MachineState.terminating:
                del self.machines[name]
            elif one.state is MachineState.starting:
                self.machines[name] = replace(one, state=MachineState.terminating)

    def terminate(self, machine_id: str) -> None:
        if not self.may_end:
            self.calls.append(("terminate", machine_id))
            raise CloudError(
                "you may not end machines", code="Forbidden", trouble=Trouble.credentials
            )
        super().terminate(machine_id)

    def list(self) -> Sequence[Machine]:
        there = super().list()
        for one in there:
            if self.refusals is not None and one.state is MachineState.terminating:
                error = CloudError("no room", code="Full", trouble=Trouble.capacity)
                self.refusals.keep(one.zone, one.purchase, error)
        shown = ((one, self.shown.get(one.id, one.state)) for one in there)
        return [
            replace(one, state=state, created_at=one.created_at + self.ahead)
            for one, state in shown
            if state is not None
        ]


class Group:
    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.cloud, self.book = clock, OddCloud(), MemoryBook()
        self.restart()

    def restart(self) -> None:
        """Another process takes over."""
        tokens = (f"t{number}" for number in count())
        self.reconciler = Reconciler(
            "gpu",
            self.cloud,
            self.book,
            prepare=lambda launch: launch,
            clock=self.clock,
            make_token=lambda: next(tokens),
        )

    def has(self, name: str, state: MachineState = MachineState.running, **known: Any) -> None:
        """A machine of the group's, an hour old, a worker of which was seen ten minutes ago."""
        born, seen = self.ago(hours=1), self.ago(minutes=10)
        self.cloud.machines[name] = machine = Machine(id=name, created_at=born, state=state)
        values = {"listed_at": seen, "registered_at": born, "worker_seen_at": seen, **known}
        self.book.save(Known(machine=machine, **values))

    def ago(self, **time: float) -> datetime:
        return self.clock() - timedelta(**time)

    def look(
        self,
        *,
        waiting: int = 0,
        workers: Sequence[str] = (),
        busy: int = 1,
        seen_at: datetime | None = None,
        watched_since: datetime | None = None,
    ) -> Outcome:
        at = seen_at or self.clock()
        seats = [Seat(worker="w", machine_id=one, busy=busy, seen_at=at) for one in workers]
        load = Load(
            waiting={0: waiting} if waiting else {},
            seats=tuple(seats),
            watched_since=watched_since,
        )
        return self.reconciler.step(load, POLICY)

    def looks(self, minutes: int, **load: Any) -> list[Outcome]:
        found = []
        for _ in range(6 * minutes):
            self.clock.advance(10)
            found.append(self.look(**load))
        return found

    def troubles(self) -> list[str]:
        return [text for kind, text, _ in self.book.history if kind is Kind.trouble]


@pytest.fixture
def group(clock: FakeClock) -> Group:
    return Group(clock)


def test_a_start_that_does_nothing_is_told_and_another_machine_is_launched(group: Group):
    group.has("m", MachineState.stopped, stopped_since=group.ago(minutes=5))
    group.look(waiting=1)
    assert group.cloud.called("start") == ["m"]
    group.looks(3, waiting=1)
    assert len(group.cloud.called("launch")) == 1
    assert [text.split(" at ")[0] for text in group.troubles()] == ["start was accepted"]


def test_a_machine_that_cannot_be_ended_is_told_once_and_tried_ever_more_rarely(group: Group):
    group.cloud.may_end = False
    group.has("m")
    outcomes = group.looks(60)
    assert outcomes[-1].trouble == "machine m: terminate was refused: you may not end machines"
    assert len(group.troubles()) == 1
    assert 5 <= len(group.cloud.called("terminate")) <= 12
    group.cloud.may_end = True
    ended = group.looks(15)
    assert group.cloud.machines == {}
    assert ended[-1].trouble is None


def test_a_machine_whose_worker_checks_in_is_not_gone_though_no_list_has_it(group: Group):
    group.has("m")
    group.look(workers=["m"])
    group.cloud.shown["m"] = None
    outcomes = group.looks(10, workers=["m"])
    assert not any(one.dead for one in outcomes)
    assert "not listed machine m" in (outcomes[-1].trouble or "")
    assert any("m" in one.dead for one in group.looks(8))


def test_a_death_is_told_again_when_telling_it_has_failed(group: Group):
    group.has("m")
    group.look(workers=["m"])
    group.cloud.lose("m")
    group.clock.advance(10)
    assert set(group.look().dead) == {"m"}
    for _ in range(2):
        group.reconciler.not_told()
        assert set(group.look().dead) == {"m"}
    assert not group.look().dead
    assert group.book.gone == {"m"}


@pytest.mark.parametrize("stale", [MachineState.stopping, MachineState.stopped])
def test_lists_from_before_a_start_are_not_believed(group: Group, stale: MachineState):
    group.has("m", MachineState.stopped, stopped_since=group.ago(minutes=5))
    group.look(waiting=1)
    for shown in (MachineState.running, stale, MachineState.running, stale):
        group.cloud.shown["m"] = shown
        group.clock.advance(5)
        group.look(waiting=1)
    assert group.cloud.called("start") == ["m"]
    group.cloud.shown["m"] = MachineState.stopped  # for good
    group.looks(2, waiting=1)
    assert len(group.cloud.called("start")) == 2


@pytest.mark.parametrize("hours", [-1, 1])
def test_e07_a_machine_has_its_time_to_boot_by_our_clock(group: Group, hours: int):
    group.cloud.ahead = group.clock() - utcnow() + timedelta(hours=hours)
    group.look(waiting=1)
    group.looks(14, waiting=1)
    assert not group.cloud.called("terminate")
    group.looks(2, waiting=1)
    assert len(group.cloud.called("terminate")) == 1


def test_an_outage_of_the_broker_is_no_silence_of_a_machine_that_no_list_has(group: Group):
    group.has("m")
    group.cloud.shown["m"] = None
    group.looks(5, workers=["m"])
    before = group.clock()
    group.clock.advance(40)
    assert not group.look(workers=["m"], seen_at=before, watched_since=group.clock()).dead
    back = group.clock()
    for _ in range(6):
        group.clock.advance(10)
        assert not group.look(workers=["m"], seen_at=before, watched_since=back).dead
    assert not any(one.dead for one in group.looks(10, workers=["m"]))
    assert any("m" in one.dead for one in group.looks(9))  # as silent as any machine that is lost


def test_a_worker_that_blinks_is_no_death_of_a_machine_that_no_list_has(group: Group):
    group.has("m")
    group.cloud.shown["m"] = None
    group.looks(5, workers=["m"])
    assert not any(one.dead for one in group.looks(2))
    assert not any(one.dead for one in group.looks(2, workers=["m"]))


def test_a_start_that_was_refused_is_no_trouble_when_nobody_waits(group: Group):
    group.has("m", MachineState.stopped, stopped_since=group.ago(minutes=5))
    group.cloud.may_start = False
    group.look(waiting=1)
    assert [text.split(":")[0] for text in group.troubles()] == ["start was refused"]
    assert len(group.cloud.called("launch")) == 1
    group.clock.advance(10)
    assert group.look(workers=list(group.cloud.machines)[1:]).trouble is None


def test_a_worker_of_a_machine_that_counts_as_gone_is_told_to_go_and_not_counted_on(group: Group):
    group.has("m")
    group.cloud.shown["m"] = None
    group.looks(12)
    assert group.book.gone == {"m"}
    group.restart()
    group.clock.advance(10)
    found = group.look(workers=["m"])
    assert found.drain == {"w": "its machine counts as gone"}
    assert (found.trouble or "").startswith("machine m: it counts as gone")
    group.look(waiting=1, workers=["m"], busy=0)
    assert len(group.cloud.called("launch")) == 1
    group.looks(1, workers=["m"])
    assert len([text for text in group.troubles() if "counts as gone" in text]) == 1
    group.clock.advance(10)
    assert group.look().trouble is None


@pytest.mark.parametrize("told", [True, False], ids=["with a reason", "without"])
def test_launches_that_are_withdrawn_hold_their_zone_and_are_no_failures_to_check_in(
    group: Group, told: bool
):
    group.cloud.room = False
    group.cloud.refusals = Refusals(group.clock) if told else None
    for _ in range(6 * 15):
        group.clock.advance(10)
        group.look(waiting=1)
        group.cloud.withdraw()
    reasons = {text.split(";")[0] for text in group.troubles()}
    words = "no room" if told else "launches are accepted and ended by the cloud before they run"
    assert len(reasons) == 1
    assert reasons.pop().startswith(words)
    assert len(group.cloud.called("launch")) <= 12
