"""Every waiting execution can say why it waits."""

from __future__ import annotations

from typing import Any

from valohai_agent.protocol import PROTOCOL_VERSION, Worker
from valohai_dagster.executions.waiting import why_it_waits


def worker(**values: Any) -> Worker:
    return Worker(
        **{"name": "w1", "incarnation": "i", "group": "gpu", "version": "0.1.0", **values}
    )


def test_a_group_without_workers_says_how_to_start_one():
    text = why_it_waits("gpu", [], local=False, ahead=0)
    assert "no worker of group gpu has checked in" in text
    assert "valohai-agent run --queue gpu" in text


def test_workers_of_another_protocol_are_named_with_their_versions():
    newer = worker(protocol=PROTOCOL_VERSION + 2, protocol_min=PROTOCOL_VERSION + 1, version="9.0")
    text = why_it_waits("gpu", [newer], local=False, ahead=0)
    assert f"needs protocol {PROTOCOL_VERSION}" in text
    assert "w1 9.0" in text


def test_busy_workers_are_counted():
    text = why_it_waits("gpu", [worker(slots=2, busy=2)], local=True, ahead=3)
    assert text == "waiting for a free slot in group gpu: 2 of 2 busy on 1 workers, 3 ahead"
