"""What the metrics say of a run that the conductor has driven."""

from __future__ import annotations

from pathlib import Path

from tests.support.conductor import ConductorSide
from tests.support.dagster_side import Ask, Code
from tests.support.redis_server import RedisServer
from valohai_dagster import telemetry
from valohai_dagster.observability.prometheus import Metrics

YAML = """
- step:
    name: train
    image: python:3.11
    command: python train.py
"""


def test_the_way_from_report_to_event_is_timed(tmp_path: Path, redis_server: RedisServer) -> None:
    metrics = Metrics()
    code = Code.write(tmp_path / "code", YAML)
    with (
        telemetry.listening(metrics),
        ConductorSide(tmp_path / "side", code, {}, redis_server) as side,
    ):
        run = side.run(Ask(assets=["train"]))
        assert run.is_success
    values = {
        sample.name: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if not sample.labels
    }
    # leased, running, the end: each once from the agent's report into Dagster's log
    assert values["valohai_report_to_event_seconds_count"] == 3
    assert 0 < values["valohai_report_to_event_seconds_sum"] < 60
    assert values["valohai_lane_seconds_count"] > 3
