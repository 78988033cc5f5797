"""Machines that come and go with the work, and what Dagster's UI tells of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import LOCATION, Deployment, Probe
from tests.support.dagster_app import REPOSITORY, DagsterApp
from tests.support.ports import wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow

LOAD_MS = 30_000
LEAVING = ("terminating", "missing", "gone")
SELECTOR = {
    "repositoryLocationName": LOCATION,
    "repositoryName": REPOSITORY,
    "sensorName": "autoscaling",
}
_START = """
mutation Start($selector: SensorSelector!) {
  startSensor(sensorSelector: $selector) { __typename ... on PythonError { message } }
}
"""
_TICKS = """
query Ticks($selector: SensorSelector!) {
  sensorOrError(sensorSelector: $selector) {
    ... on Sensor { sensorState { ticks(limit: 20) {
      status skipReason logKey logEvents { events { message level } }
    } } }
  }
}
"""


def ticks(app: DagsterApp) -> list[dict[str, Any]]:
    """Newest first, those that are over."""
    found = app.graphql(_TICKS, selector=SELECTOR)["sensorOrError"]["sensorState"]["ticks"]
    return [tick for tick in found if tick["status"] != "STARTED"]


def machines(deployment: Deployment) -> list[dict[str, Any]]:
    told = deployment.cli("machines", "ls", "--group", "pretend", "--all", "--json")
    return json.loads(told.stdout)


def test_a_machine_comes_for_an_execution_and_goes_and_the_sensor_tells_both_with_reasons(
    app: DagsterApp, probe: Probe, deployment: Deployment, page: Page, artifacts: Path
) -> None:
    run_id = probe.run("draw", parameters={"size": 4}, environment="pretend")
    assert app.metadata(run_id, "draw")["metrics/area"] == 16
    (machine,) = wait_for(
        lambda: [one for one in machines(deployment) if one["state"] in LEAVING],
        seconds=60,
        every=0.5,
        what="the end of the idle machine",
    )
    started = app.graphql(_START, selector=SELECTOR)["startSensor"]
    assert started["__typename"] == "Sensor", started
    (tick, *_) = wait_for(lambda: ticks(app), seconds=60, every=0.5, what="a tick")
    assert tick["status"] == "SKIPPED"
    assert "pretend: 0 waiting" in tick["skipReason"]
    lines = "\n".join(event["message"] for event in tick["logEvents"]["events"])
    assert "1 waiting" in lines
    assert f"[{machine['machine']}]" in lines
    page.goto(f"{app.url}/locations/{LOCATION}/sensors/autoscaling", timeout=LOAD_MS)
    page.get_by_text("View logs").first.click(timeout=LOAD_MS)
    dialog = page.get_by_role("dialog")
    for text in ("launch 1 (on-demand): 1 waiting", "drained", "pretend: 0 waiting"):
        dialog.get_by_text(text).first.wait_for(timeout=LOAD_MS)
    page.screenshot(path=artifacts / "autoscaling-ticks.png")
