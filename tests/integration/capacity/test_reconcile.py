"""The reconciler with real records, on a cloud on paper whose clock the tests move."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.clouds.paper import PaperCloud, refusal
from valohai_dagster.capacity.book import Kind
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble
from valohai_dagster.capacity.look import Outcome
from valohai_dagster.capacity.machines import MachineRecords
from valohai_dagster.capacity.model import Intent, Policy, Purchase
from valohai_dagster.capacity.reconcile import Reconciler
from valohai_dagster.errors import ConfigurationError
from valohai_dagster.records.capacity_tables import capacity_events, intents, machines
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings

POLICY = Policy(max_machines=4, zones=("a", "b"), grace=timedelta(minutes=2))


class Group:
    """One group, its cloud, and whoever looks after it."""

    def __init__(self, records: Records, cloud: PaperCloud, policy: Policy = POLICY) -> None:
        self.records, self.cloud, self.policy = records, cloud, policy
        tokens = (f"t{number}" for number in count())
        self.token = lambda: next(tokens)
        self.prepare = lambda launch: launch
        self.restart()

    def restart(self) -> None:
        """Another process takes over: nothing is known but what is written down."""
        self.book = MachineRecords(self.records, "gpu", kind="paper", clock=self.cloud.clock)
        self.reconciler = Reconciler(
            "gpu",
            self.cloud,
            self.book,
            prepare=lambda launch: self.prepare(launch),
            clock=self.cloud.clock,
            make_token=lambda: self.token(),
        )

    def look(self) -> Outcome:
        """The cloud's workers hear what comes of it."""
        outcome = self.reconciler.step(self.cloud.load(), self.policy)
        self.cloud.hear(outcome)
        return outcome

    def go_on(self, *, seconds: float, tick: float = 10.0) -> list[Outcome]:
        found = []
        for _ in range(int(seconds / tick)):
            self.cloud.advance(tick)
            found.append(self.look())
        return found

    def history(self, kind: Kind) -> list[str]:
        query = sa.select(capacity_events.c.text).where(capacity_events.c.kind == kind.value)
        with self.records.read() as conn:
            return list(conn.execute(query.order_by(capacity_events.c.id)).scalars())

    @property
    def alive(self) -> list[str]:
        return [name for name, box in self.cloud.read().boxes.items() if box.ended is None]


@pytest.fixture
def records(settings: Settings) -> Iterator[Records]:
    opened = open_records(settings)
    yield opened
    opened.close()


@pytest.fixture
def cloud(tmp_path: Path) -> PaperCloud:
    return PaperCloud(tmp_path / "cloud.json")


@pytest.fixture
def group(records: Records, cloud: PaperCloud) -> Group:
    return Group(records, cloud)


# -- the whole way -------------------------------------------------------------------------------------------------


def test_machines_come_for_jobs_and_go_after_their_grace(group: Group) -> None:
    group.cloud.submit(3)
    first = group.look()
    assert first.decisions == (
        "launch 2 (a, on-demand): 3 waiting",
        "launch 1 (b, on-demand): 3 waiting",
    )
    assert group.cloud.calls == ["list", "launch 2 a", "launch 1 b"]
    outcomes = group.go_on(seconds=600)
    world = group.cloud.read()
    assert (world.done, world.most, world.taken_while_busy, group.alive) == (3, 3, 0, [])
    assert sorted(world.deaths) == ["m0", "m1", "m2"]
    assert group.book.machines() == []
    assert group.book.intents() == []
    assert outcomes[-1].summary == "0 waiting; machines: none"
    assert len(group.history(Kind.registered)) == 3
    with group.records.read() as conn:
        rows = conn.execute(sa.select(machines)).all()
    assert {row.kind for row in rows} == {"paper"}
    assert all(row.created_at < row.registered_at < row.gone_at for row in rows)


def test_a_look_at_a_settled_group_does_nothing(group: Group) -> None:
    group.cloud.submit(1)
    group.look()
    group.go_on(seconds=100)
    calls = len(group.cloud.calls)
    assert group.look() == group.look()
    assert group.cloud.calls[calls:] == []  # the list is not three seconds old


def test_idle_machines_are_stopped_first_and_started_again(
    records: Records, tmp_path: Path
) -> None:
    cloud = PaperCloud(tmp_path / "cloud.json", can_stop=True)
    policy = Policy(grace=timedelta(minutes=2), stop_when_idle=True, boot=timedelta(minutes=3))
    group = Group(records, cloud, policy)
    cloud.submit(1)
    group.look()
    group.go_on(seconds=400)
    assert cloud.read().boxes["m0"].state == "stopped"
    cloud.submit(1)
    group.go_on(seconds=200)
    assert cloud.read().done == 2
    assert group.alive == ["m0"]
    group.go_on(seconds=300)
    group.go_on(seconds=3700, tick=100)
    group.go_on(seconds=100)
    assert group.alive == []
    with records.read() as conn:
        row = conn.execute(sa.select(machines)).one()
    assert row.gone_at is not None
    assert row.stopped_seconds > 3600


def test_stopping_is_left_out_where_the_cloud_cannot(group: Group) -> None:
    group.policy = Policy(grace=timedelta(minutes=1), stop_when_idle=True)
    group.cloud.submit(1)
    group.look()
    group.go_on(seconds=400)
    assert group.alive == []


# -- what the cloud refuses ----------------------------------------------------------------------------------------


def test_another_zone_is_tried_in_the_same_look(group: Group) -> None:
    group.cloud.trouble = {"a": refusal(Trouble.capacity, zone="a")}
    group.cloud.submit(1)
    assert group.look().trouble is None
    assert group.cloud.calls == ["list", "launch 1 a", "launch 1 b"]


def test_no_capacity_anywhere_is_told_and_clears_itself(group: Group) -> None:
    zones = ("a", "b")
    group.cloud.trouble = {zone: refusal(Trouble.capacity, zone=zone) for zone in zones}
    group.cloud.submit(1)
    outcome = group.look()
    assert outcome.trouble == "no: capacity in a; tried again at 12:01:00 UTC"
    assert outcome.next_look is not None
    assert len(group.history(Kind.trouble)) == 2
    held = group.go_on(seconds=50)
    assert {one.trouble for one in held} == {outcome.trouble}
    assert sum(call.startswith("launch") for call in group.cloud.calls) == 2
    group.cloud.trouble = {}
    assert group.go_on(seconds=20)[-1].trouble is None
    group.go_on(seconds=60)  # until a worker of the new machine checks in
    assert [hold.zone for hold in group.book.holds()] == ["b"]
    assert group.history(Kind.cleared) == ["machines come again; before: no: capacity in a"]


def test_spot_gives_way_to_on_demand(group: Group) -> None:
    group.policy = Policy(spot=True, on_demand_fallback=True)
    real, calls = group.cloud.launch, []

    def launch(launch: Launch) -> object:
        calls.append(launch.purchase)
        if launch.purchase is Purchase.spot:
            raise CloudError("no spot", code="x", trouble=Trouble.capacity, purchase=Purchase.spot)
        return real(launch)

    group.cloud.launch = launch  # type: ignore[method-assign, assignment]
    group.cloud.submit(1)
    outcome = group.look()
    assert calls == [Purchase.spot, Purchase.on_demand]
    assert outcome.trouble is None
    assert outcome.decisions[1:] == (
        "launch 1 (on-demand): 1 waiting, and there is no spot capacity",
    )


def test_a_cloud_that_cannot_be_listed_changes_nothing_and_is_told(group: Group) -> None:
    group.cloud.submit(1)
    group.look()
    group.go_on(seconds=300)  # idle, and its grace is nearly over
    group.cloud.list_trouble = refusal(Trouble.credentials, text="the key was not accepted")
    group.cloud.calls.clear()
    outcomes = group.go_on(seconds=200)
    assert set(group.cloud.calls) == {"list"}
    assert len(group.cloud.calls) < 6  # less and less often
    assert all((one.trouble or "").startswith("the key was not accepted") for one in outcomes)
    assert group.history(Kind.trouble) == [group.history(Kind.trouble)[0]]
    group.cloud.list_trouble = None
    group.reconciler.retry_now()
    group.go_on(seconds=60)
    assert group.alive == []


def test_a_launch_without_an_answer_is_repeated_with_its_token(group: Group) -> None:
    real = group.cloud.launch

    def launch(launch: Launch) -> object:
        real(launch)
        raise refusal(Trouble.outage, text="the connection broke")

    group.cloud.launch = launch  # type: ignore[method-assign, assignment]
    group.cloud.submit(1)
    assert (group.look().trouble or "").startswith("the connection broke; tried again at")
    assert group.book.intents()  # it counts: it may have had its effect
    group.cloud.launch = real
    group.go_on(seconds=60)
    assert group.cloud.read().most == 1
    assert group.book.intents() == []
    assert group.book.holds() == []


def test_a_launch_that_never_comes_holds_its_zone(group: Group) -> None:
    group.cloud.launch = lambda launch: []
    group.cloud.submit(1)
    group.look()
    group.go_on(seconds=320)
    (hold,) = group.book.holds()
    assert hold.zone == "a"
    assert hold.reason.startswith("0 of 1 machines asked for at 12:00:00 UTC")
    (intent,) = group.book.intents()
    assert intent.zone == "b"


def test_what_cannot_be_prepared_is_told(group: Group) -> None:
    def prepare(launch: Launch) -> Launch:
        raise ConfigurationError("no agent was published: run `valohai-dagster agent publish`")

    group.prepare = prepare
    group.cloud.submit(1)
    assert "no agent was published" in (group.look().trouble or "")
    assert group.book.intents() == []
    assert "launch 1 a" not in group.cloud.calls


def test_a_refused_end_is_tried_again(group: Group) -> None:
    group.cloud.submit(1)
    group.look()
    real = group.cloud.terminate

    def terminate(machine_id: str) -> None:
        raise refusal(Trouble.throttled, text="slow down")

    group.cloud.terminate = terminate
    group.go_on(seconds=350)
    assert group.alive == ["m0"]
    assert "terminate was refused: slow down" in group.history(Kind.trouble)
    group.cloud.terminate = real
    group.go_on(seconds=60)
    assert group.alive == []


def test_e07_three_machines_that_never_check_in_hold_the_group(group: Group) -> None:
    group.policy = Policy(max_machines=1, boot=timedelta(minutes=2))
    group.cloud.duds = True
    group.cloud.submit(1)
    group.look()
    outcomes = group.go_on(seconds=500)
    assert len(group.cloud.read().boxes) == 3
    assert "3 machines in a row never checked in" in (outcomes[-1].trouble or "")
    group.go_on(seconds=400)
    assert len(group.cloud.read().boxes) == 3
    group.cloud.duds = False
    group.go_on(seconds=500)
    assert group.cloud.read().done == 1
    assert any("check in again" in text for text in group.history(Kind.cleared))


# -- machines that nobody launched, or that vanish -----------------------------------------------------------------


def test_a_machine_of_nobody_is_marked_and_ended_later(group: Group) -> None:
    group.cloud.duds = True
    group.cloud.add("stray", token="unknown", created=-5000.0)
    assert group.look().decisions == ()
    (known,) = group.book.machines()
    assert known.adopted
    assert known.orphan_since == group.cloud.clock()
    group.go_on(seconds=590)
    assert group.alive == ["stray"]
    group.go_on(seconds=20)
    assert group.alive == []
    assert len(group.history(Kind.orphan)) == 1


def test_a_machine_of_nobody_with_a_worker_is_adopted(group: Group) -> None:
    group.cloud.add("stray", token="unknown", here=0.0, busy_until=900.0)
    group.look()
    assert group.history(Kind.adopted) != []
    group.go_on(seconds=800)
    assert group.alive == ["stray"]
    group.go_on(seconds=500)
    assert group.alive == []
    assert group.cloud.read().taken_while_busy == 0


def test_a_machine_of_an_open_launch_is_ours_even_where_clouds_keep_no_tokens(
    records: Records, tmp_path: Path
) -> None:
    group = Group(records, PaperCloud(tmp_path / "cloud.json", keeps_tokens=False, lag=20.0))
    group.cloud.submit(1)
    group.look()
    group.go_on(seconds=60)
    (known,) = group.book.machines()
    assert (known.adopted, known.machine.token) == (False, "t0")
    assert group.book.intents() == []


def test_a_machine_is_missing_for_a_while_before_it_is_forgotten(
    records: Records, tmp_path: Path
) -> None:
    group = Group(records, PaperCloud(tmp_path / "cloud.json", job=10_000.0))
    group.cloud.submit(1)
    group.look()
    group.go_on(seconds=30)
    real = group.cloud.list
    group.cloud.list = list
    group.go_on(seconds=250)
    assert [known.gone_at for known in group.book.machines()] == [None]
    group.cloud.list = real
    group.look()
    group.go_on(seconds=10)
    assert group.book.machines()[0].missing_since is None
    group.cloud.list = list
    group.cloud.lose("m0")
    group.go_on(seconds=120)
    assert group.book.machines() == []
    assert "m0" in group.cloud.read().deaths


def test_a_lost_machine_is_told_and_replaced(group: Group) -> None:
    group.cloud.submit(1)
    group.look()
    group.go_on(seconds=100)
    group.cloud.lose("m0")
    (outcome,) = group.go_on(seconds=10)
    assert outcome.dead == {"m0": "the cloud has ended it"}
    assert outcome.decisions == ("launch 1 (a, on-demand): 1 waiting",)
    assert group.history(Kind.lost) == ["lost: the cloud has ended it"]
    assert group.go_on(seconds=10)[0].dead == {}


def test_a_death_that_was_not_told_is_told_by_the_next_process(group: Group) -> None:
    group.cloud.submit(1)
    group.look()
    group.go_on(seconds=100)
    group.cloud.lose("m0")
    group.cloud.advance()
    group.reconciler.step(group.cloud.load(), group.policy)  # killed before it could tell
    group.restart()
    assert group.look().dead == {"m0": "the cloud has ended it"}
    assert group.look().dead == {}


def test_a_drain_that_was_not_told_is_told_by_the_next_process(group: Group) -> None:
    group.cloud.submit(1)
    group.look()
    group.go_on(seconds=270)
    group.cloud.advance(60)
    outcome = group.reconciler.step(group.cloud.load(), group.policy)
    assert outcome.drain == {"w-m0": "idle for 120 s"}
    group.restart()
    assert group.look().drain == {"w-m0": "idle for 120 s"}
    assert len([text for text in group.history(Kind.decision) if text.startswith("drain")]) == 1
    group.go_on(seconds=30)
    assert group.alive == []


def test_many_ends_are_spread_over_looks_so_that_launches_need_not_wait(group: Group) -> None:
    group.cloud.submit(4)
    group.look()
    group.go_on(seconds=270)
    real = group.cloud.terminate

    def slow(machine_id: str) -> None:
        real(machine_id)
        world = group.cloud.read()
        world.seconds += 3.0
        group.cloud.write(world)

    group.cloud.terminate = slow
    outcomes = group.go_on(seconds=60)
    ended = [[text for text in one.decisions if text.startswith("term")] for one in outcomes]
    assert [len(texts) for texts in ended if texts] == [2, 2]
    assert group.alive == []


# -- two at once ---------------------------------------------------------------------------------------------------


def test_of_two_reconcilers_the_later_view_acts(group: Group) -> None:
    other = Group(group.records, PaperCloud(group.cloud._path))
    group.cloud.submit(1)

    intend = group.book.intend

    def late(intent: Intent) -> None:
        other.look()
        intend(intent)

    group.book.intend = late
    outcome = group.look()
    group.book.intend = intend
    assert outcome.decisions == ()
    assert "another process" in outcome.summary
    assert group.cloud.calls == ["list"]
    assert other.cloud.calls == ["list", "launch 1 a"]
    group.look()
    group.go_on(seconds=30)
    assert group.cloud.read().most == 1


def test_two_reconcilers_at_the_same_time_ask_for_no_more_than_one_would(
    records: Records, tmp_path: Path
) -> None:
    """Threads with the same records; calls of the cloud are one at a time, as a cloud has them."""
    cloud, lock = PaperCloud(tmp_path / "cloud.json", boot=30.0, job=50.0), threading.RLock()
    for name in ("list", "launch", "terminate", "load", "hear", "clock"):
        setattr(cloud, name, _one_at_a_time(getattr(cloud, name), lock))
    groups = [Group(records, cloud), Group(records, cloud)]
    tokens = (f"t{number}" for number in count())
    for one in groups:
        one.token = lambda: next(tokens)
    cloud.submit(3)
    with ThreadPoolExecutor(2) as threads:
        for _ in range(60):
            list(threads.map(lambda one: one.look(), groups))
            cloud.advance()
    world = cloud.read()
    assert (world.done, world.taken_while_busy, groups[0].alive) == (3, 0, [])
    assert world.most == 3
    assert groups[0].book.machines() == []


def _one_at_a_time(call: Callable[..., Any], lock: threading.RLock) -> Callable[..., Any]:
    def locked(*args: Any, **values: Any) -> Any:
        with lock:
            return call(*args, **values)

    return locked


def test_intents_stay_for_reading(group: Group) -> None:
    group.cloud.submit(1)
    group.look()
    group.go_on(seconds=20)
    with group.records.read() as conn:
        (row,) = conn.execute(sa.select(intents)).all()
    assert (row.action, row.outcome, row.reason) == ("launch", "1 machines", "1 waiting")
