"""Every waiting execution can say why it waits."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from valohai_agent.protocol import PROTOCOL_VERSION, Worker, WorkerState
from valohai_dagster.executions.waiting import explain_wait, since, why_it_waits


def worker(**values: Any) -> Worker:
    return Worker(
        **{"name": "w1", "incarnation": "i", "group": "gpu", "version": "0.1.0", **values}
    )


def test_a_group_without_workers_says_how_to_start_one():
    text = why_it_waits("gpu", [], local=False, ahead=0)
    assert "no worker of group gpu has checked in" in text
    assert "valohai-agent run --queue gpu" in text


def test_a_local_group_starts_its_agents_itself():
    wait = explain_wait("local", [], local=True, ahead=0)
    assert wait.state == "starting-worker"
    assert wait.next_step is None


def test_a_local_group_that_may_start_none_says_which_setting_forbids_it():
    wait = explain_wait("local", [], local=True, ahead=0, max_agents=0)
    assert "its max_agents is 0" in str(wait)


def test_workers_of_another_protocol_are_named_with_their_versions():
    newer = worker(protocol=PROTOCOL_VERSION + 2, protocol_min=PROTOCOL_VERSION + 1, version="9.0")
    text = why_it_waits("gpu", [newer], local=False, ahead=0)
    assert f"needs protocol {PROTOCOL_VERSION}" in text
    assert "w1 9.0" in text


@pytest.mark.parametrize(
    ("count", "who"), [(1, "the only worker of group gpu"), (3, "all 3 workers of group gpu")]
)
def test_workers_that_drain_take_nothing_new(count: int, who: str):
    draining = [worker(name=f"w{n}", state=WorkerState.draining) for n in range(count)]
    wait = explain_wait("gpu", draining, local=False, ahead=1)
    assert wait.state == "draining"
    assert wait.text.startswith(f"queued behind 1 in group gpu: {who} drain")


def test_busy_workers_are_counted():
    text = explain_wait("gpu", [worker(slots=2, busy=2)], local=True, ahead=3).text
    assert text == "queued behind 3 in group gpu: 2 of 2 slots busy on 1 worker"


def test_draining_workers_have_no_slots_to_offer():
    drains = worker(name="w2", slots=4, state=WorkerState.draining)
    text = explain_wait("gpu", [worker(slots=1, busy=1), drains], local=False, ahead=0).text
    assert text == "first in the queue of group gpu: 1 of 1 slots busy on 1 worker"


def test_whose_turn_it_is_waits_for_a_moment_only():
    wait = explain_wait("gpu", [worker(slots=4, busy=2)], local=False, ahead=1)
    assert (wait.state, wait.next_step) == ("next", None)


def test_old_moments_have_their_date():
    noon = datetime(2026, 1, 2, 12, tzinfo=timezone.utc)
    assert since(noon, noon + timedelta(minutes=4)) == "since 12:00:00 UTC (4 min)"
    assert since(noon, noon + timedelta(days=2)) == "since 2026-01-02 12:00 UTC (2 d 0 h)"
