"""Words for those who wait in a group whose machines come and go."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from valohai_agent.protocol import Worker
from valohai_dagster.executions.capacity_state import CapacityState, parse
from valohai_dagster.executions.waiting import Wait
from valohai_dagster.executions.waiting_machines import explain_machines

NOW = datetime(2026, 5, 4, 12, 3, 45, tzinfo=timezone.utc)


def state(**values: Any) -> CapacityState:
    return CapacityState(at=NOW, **{"max_machines": 5, **values})


def worker(**values: Any) -> Worker:
    return Worker(**{"name": "w", "incarnation": "i", "group": "gpu", "slots": 1, **values})


def explain(found: CapacityState | None, *workers: Worker, ahead: int = 2) -> Wait:
    return explain_machines("gpu", workers, found, ahead=ahead, now=NOW)


def test_a_machine_that_starts_says_since_when():
    wait = explain(state(starting=1, starting_since=NOW - timedelta(seconds=40)))
    assert wait.state == "machine-starting"
    assert wait.text == ("queued behind 2 in group gpu: a machine starts since 12:03:05 UTC (40 s)")
    assert "3 machines start" in explain(state(starting=3)).text


def test_a_trouble_is_told_with_the_next_step():
    wait = explain(state(trouble="no capacity in eu-west-1a; tried again at 12:05:00 UTC"))
    assert wait.state == "no-machine"
    assert "no machine comes up: no capacity in eu-west-1a; tried again at 12:05:00" in wait.text
    assert "groups check gpu" in (wait.next_step or "")


def test_what_starts_and_what_does_not_are_told_together():
    text = explain(state(starting=1, starting_since=NOW, trouble="no more spot capacity")).text
    assert text.endswith(
        "a machine starts since 12:03:45 UTC (0 s); more do not come: no more spot capacity"
    )


def test_e01_a_group_at_its_maximum_says_so():
    wait = explain(state(up=5), worker(busy=1))
    assert wait.state == "at-maximum"
    assert "1 of 1 slots busy on 1 worker, and it has all of its 5 machines" in wait.text
    assert "groups set gpu max_machines" in (wait.next_step or "")
    assert "may have no machine" in explain(state(max_machines=0)).text


def test_e01_a_disabled_group_says_so():
    wait = explain(state(enabled=False, trouble="x"))
    assert wait.state == "disabled"
    assert "groups enable gpu" in (wait.next_step or "")


def test_before_anything_was_done_it_says_that_it_is_about_to():
    assert explain(state()).state == "machine-wanted"
    assert "1 of 1 slots busy" in explain(state(up=1), worker(busy=1)).text


def test_without_anybody_looking_the_next_step_is_the_doctor():
    wait = explain(None)
    assert wait.state == "nobody-looks"
    assert "doctor" in (wait.next_step or "")


def test_a_free_slot_counts_more_than_any_trouble():
    assert explain(state(trouble="x", up=1), worker(), ahead=0).state == "next"


def test_the_same_trouble_at_another_time_is_the_same():
    first = state(trouble="no capacity; tried again at 12:05:00 UTC")
    later = state(trouble="no capacity; tried again at 12:09:30 UTC")
    assert first.gist == later.gist != state(trouble="no quota").gist
    assert state().gist is None


def test_what_another_version_has_written_is_nothing():
    assert parse(None) is None
    assert parse('{"summary": 5}') is None
    assert parse(state(up=2).model_dump_json()) == state(up=2)
