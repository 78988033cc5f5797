"""The checkout's code location with the probe project beside it, and a schedule and a sensor that launch the probe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg

import definitions
from valohai_dagster import load_valohai_project
from valohai_dagster.settings import load_settings

PROJECT = Path(__file__).parent / "project"
draw_job = dg.define_asset_job("draw_job", selection=dg.AssetSelection.assets(["probe", "draw"]))


def _config(size: int) -> dict[str, object]:
    return {"ops": {"probe__draw": {"config": {"parameters": {"size": size}}}}}


@dg.schedule(job=draw_job, cron_schedule="* * * * *")
def every_minute(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """Asks for one run, the first time it is due, so that it disturbs no other test."""
    marker = load_settings().state_dir / "probe-scheduled"
    if marker.exists():
        return dg.SkipReason("once is enough")
    marker.touch()
    return dg.RunRequest(run_config=_config(20), tags={"probe": "schedule"})


@dg.sensor(job=draw_job, minimum_interval_seconds=2)
def on_request(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest]:
    """One run for each file of `probe-requests` in the state directory; its name is the size."""
    for path in sorted((load_settings().state_dir / "probe-requests").glob("*")):
        config = _config(int(path.name))
        yield dg.RunRequest(run_key=path.name, run_config=config, tags={"probe": "sensor"})


defs = dg.Definitions.merge(
    definitions.defs,
    load_valohai_project(PROJECT, name="probe"),
    load_valohai_project(PROJECT, name="stubborn", retry_policy=dg.RetryPolicy(max_retries=1)),
    dg.Definitions(jobs=[draw_job], schedules=[every_minute], sensors=[on_request]),
)
