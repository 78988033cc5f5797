"""The page that Prometheus reads."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from valohai_agent.protocol import Worker, WorkerState
from valohai_dagster.executions.stream import ExecutionStatus as Status
from valohai_dagster.observability.prometheus import HELP, Metrics, Reading
from valohai_dagster.observability.readings import readings
from valohai_dagster.telemetry import Count, Seconds


class FakeQueues:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def waiting(self, group: str) -> int:
        if self.error is not None:
            raise self.error
        return 3

    async def workers(self, group: str) -> dict[str, Worker]:
        idle = Worker(name="a", incarnation="i", group=group, slots=4, busy=1)
        drains = Worker(name="b", incarnation="i", group=group, state=WorkerState.draining)
        return {"a": idle, "b": drains}


def page(queues: FakeQueues | None = None, **values: Any) -> str:
    conductor: Any = SimpleNamespace(
        groups=["gpu"],
        queues=queues or FakeQueues(),
        shards_held=8,
        driver=SimpleNamespace(driven=5, lanes=SimpleNamespace(backlog=2, written=70)),
        unfinished=lambda: [SimpleNamespace(status=Status.queued, group="gpu")] * 3,
        machines=lambda: {
            "gpu": SimpleNamespace(states={"busy": 2, "starting": 1}, max_machines=5, refused=True)
        },
    )
    for name, value in values.items():
        setattr(conductor, name, value)
    return Metrics().render(asyncio.run(readings(conductor))).decode()


def test_everything_that_is_read_at_a_scrape_is_on_the_page():
    lines = page().splitlines()
    for line in (
        'valohai_executions{group="gpu",status="queued"} 3.0',
        'valohai_queue_depth{group="gpu"} 3.0',
        'valohai_workers{group="gpu",state="idle"} 1.0',
        'valohai_workers{group="gpu",state="draining"} 1.0',
        'valohai_worker_slots{group="gpu",use="busy"} 1.0',
        'valohai_worker_slots{group="gpu",use="all"} 4.0',
        'valohai_machines{group="gpu",state="busy"} 2.0',
        'valohai_machines{group="gpu",state="idle"} 0.0',
        'valohai_machines_max{group="gpu"} 5.0',
        'valohai_machines_refused{group="gpu"} 1.0',
        "valohai_runs_in_flight 5.0",
        "valohai_lane_backlog 2.0",
        "valohai_events_written_total 70.0",
        "valohai_shards_held 8.0",
        "valohai_redis_up 1.0",
    ):
        assert line in lines


def test_the_process_tells_its_memory():
    assert "process_resident_memory_bytes" in page()


@pytest.mark.parametrize("error", [redis.ConnectionError("away"), redis.TimeoutError("slow")])
def test_without_redis_the_rest_is_told(error: Exception):
    text = page(FakeQueues(error))
    assert "valohai_redis_up 0.0" in text
    assert "valohai_queue_depth" not in text
    assert "valohai_runs_in_flight 5.0" in text


def test_while_the_driver_is_being_imported_the_rest_is_told():
    assert "valohai_runs_in_flight" not in page(driver=None)


def test_all_that_may_be_told_has_a_help_text_and_can_be_told():
    metrics = Metrics()
    for what in Count:
        metrics.count(what, 1, dict.fromkeys(what.labels, "x"))
    for what in Seconds:
        metrics.observe(what, 0.5, dict.fromkeys(what.labels, "x"))
    text = metrics.render([]).decode()
    for what, words in HELP.items():
        assert words in text
        assert f"valohai_{what.value}" in text


def test_each_scrape_shows_its_own_readings():
    metrics = Metrics()
    first = metrics.render([Reading(name="x", help="X.", value=1)])
    second = metrics.render([Reading(name="x", help="X.", value=2)])
    assert b"valohai_x 1.0" in first
    assert b"valohai_x 1.0" not in second
