"""Automation of the example project: all of it each night, and a training whenever somebody asks by file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from valohai_dagster.settings import load_settings

PROJECT = "digits"

digits_job = dg.define_asset_job(
    "digits_all",
    selection=dg.AssetSelection.key_prefixes(PROJECT),
    description="Preprocess, train and evaluate.",
)
train_job = dg.define_asset_job(
    "digits_train",
    selection=dg.AssetSelection.assets(dg.AssetKey([PROJECT, "train"])),
    description="Train on the dataset that is there.",
)
digits_nightly = dg.ScheduleDefinition(
    name="digits_nightly",
    job=digits_job,
    cron_schedule="0 3 * * *",
    description="The whole project at three in the morning.",
)


def requests_dir() -> Path:
    """Where `retrain_on_request` looks: `training-requests` in the state directory."""
    return load_settings().state_dir / "training-requests"


@dg.sensor(job=train_job, minimum_interval_seconds=10)
def retrain_on_request(context: dg.SensorEvaluationContext) -> Iterator[Any]:
    """Trains once for each file `training-requests/*.json` of the state directory.

    The file holds parameters of the step: {"epochs": 30, "learning-rate": 0.02}. The cursor is the name of the last
    file taken, so name them in order, for example by date.
    """
    waiting = sorted(
        path for path in requests_dir().glob("*.json") if path.name > (context.cursor or "")
    )
    if not waiting:
        yield dg.SkipReason(f"no new file in {requests_dir()}")
    for path in waiting:
        yield _request(path)
        context.update_cursor(path.name)


def _request(path: Path) -> dg.RunRequest | dg.SkipReason:
    """A broken file is skipped with its reason, so that it cannot block those after it."""
    try:
        parameters = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        return dg.SkipReason(f"{path.name} is not readable JSON: {error}")
    if not isinstance(parameters, dict):
        return dg.SkipReason(f"{path.name} does not hold a JSON object of parameters")
    return dg.RunRequest(
        run_key=path.name,
        run_config={"ops": {f"{PROJECT}__train": {"config": {"parameters": parameters}}}},
        tags={"training-request": path.name},
    )
