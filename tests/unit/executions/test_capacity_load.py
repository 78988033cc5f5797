"""Workers as the planner sees them."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from valohai_agent.protocol import Worker, WorkerState
from valohai_dagster.executions.capacity_load import (
    SETTLE,
    UPDATE_PAUSE,
    Running,
    Seats,
    Updates,
    fingerprint,
)

NOW = datetime(2026, 5, 4, 12, 0, 0, tzinfo=timezone.utc)


def worker(**values: Any) -> Worker:
    defaults = {"name": "w", "incarnation": "i", "group": "gpu", "machine_id": "m-1"}
    return Worker(**{**defaults, "supervised": True, **values})


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def test_idle_is_counted_from_when_it_was_first_seen_and_anew_after_work():
    seats = Seats()
    assert seats.look([worker()], at(0))[0].idle_since == at(0)
    assert seats.look([worker()], at(9))[0].idle_since == at(0)
    assert seats.look([worker(busy=1)], at(10))[0].idle_since is None
    assert seats.look([worker()], at(20))[0].idle_since == at(20)


def test_another_process_of_the_same_name_is_another_worker():
    seats = Seats()
    seats.look([worker()], at(0))
    assert seats.look([worker(incarnation="j")], at(9))[0].idle_since == at(9)


def test_a_worker_that_begins_to_drain_may_still_be_getting_a_job():
    seats, drains = Seats(), worker(state=WorkerState.draining)
    assert seats.look([drains], at(0))[0].busy == 1
    settled = at(SETTLE.total_seconds())
    assert seats.look([drains], settled)[0].busy == 0
    assert seats.look([worker(state=WorkerState.draining, busy=2)], settled)[0].busy == 2


def test_who_was_on_a_machine_is_known_after_they_have_fallen_silent():
    seats = Seats()
    seats.look([worker(name="a"), worker(name="b"), worker(name="c", machine_id="m-2")], at(0))
    seats.look([], at(60))
    assert seats.workers_on("m-1") == {"a", "b"}
    seats.forget("m-1")
    assert seats.workers_on("m-1") == set()


def test_outdated_workers_are_marked():
    seats = Seats()
    assert [one.outdated for one in seats.look([worker()], NOW, outdated={"w"})] == [True]


def test_only_what_matters_changes_the_fingerprint():
    before = fingerprint({0: 2}, [worker(seen_at="1")])
    assert fingerprint({0: 1, 5: 1}, [worker(seen_at="2")]) == before
    assert fingerprint({0: 2}, [worker(busy=1)]) != before
    assert fingerprint({0: 2}, []) != before
    assert fingerprint({0: 3}, [worker()]) != before


def test_idle_workers_of_another_version_are_updated_one_after_another():
    updates = Updates()
    old, busy = worker(name="a", version="1.0.0"), worker(name="b", version="1.0.0", busy=1)
    new, far = worker(name="c", version="1.0.1"), worker(name="d", version="0.1.0")
    them = [old, busy, new, far]
    assert updates.next(them, "1.0.1", at(0), outdated={"d"}) == "a"
    assert updates.next(them, "1.0.1", at(1), outdated={"d"}) is None  # told, and on its way
    later = UPDATE_PAUSE.total_seconds() + 1
    assert updates.next(them, "1.0.1", at(later), outdated={"d"}) == "a"
    lone = worker(name="f", version="1.0.0", supervised=False)  # nobody would start it again
    assert Updates().next([lone], "1.0.1", NOW, outdated=()) is None
    leaving = [old, worker(name="e", version="1.0.0", state=WorkerState.draining)]
    assert Updates().next(leaving, "1.0.1", NOW, outdated=()) is None


def test_a_worker_that_falls_silent_with_work_is_busy_until_that_is_anothers():
    seats = Seats()
    work = Running(worker="w", machine_id="m-1", since=at(0))
    seats.look([worker(busy=1, slots=3)], at(0), running=[work])
    (silent,) = seats.look([], at(40), running=[work])
    assert (silent.busy, silent.slots, silent.seen_at) == (1, 3, at(0))
    assert seats.look([], at(400)) == ()


def test_of_work_from_before_this_process_only_what_the_records_say_is_known():
    unknown = Running(worker="v", machine_id="", since=at(0))
    work = [Running(worker="w", machine_id="m-1", since=at(0)), unknown]
    (silent,) = Seats().look([], at(40), running=work)
    assert (silent.worker, silent.machine_id, silent.busy) == ("w", "m-1", 1)
