"""The same three executions, started in each way that people start them."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import Deployment
from tests.support.dagster_app import DagsterApp
from tests.support.ports import wait_for

LOCATION = "valohai"
FAST = {"ops": {"digits__train": {"config": {"parameters": {"epochs": 3}}}}}
_SCHEDULE = """
mutation Tick($selector: ScheduleSelector!) {
  scheduleDryRun(selectorData: $selector, timestamp: 1767240000) {
    __typename
    ... on DryRunInstigationTick { evaluationResult { error { message } runRequests { runKey } } }
    ... on PythonError { message }
  }
}
"""
_START_SENSOR = """
mutation Start($selector: SensorSelector!) {
  startSensor(sensorSelector: $selector) {
    __typename ... on PythonError { message } ... on SensorNotFoundError { message }
  }
}
"""
_START_SCHEDULE = """
mutation Start($selector: ScheduleSelector!) {
  startSchedule(scheduleSelector: $selector) {
    __typename ... on PythonError { message }
  }
}
"""
_RUNS = """
query Runs($tag: String!, $value: String!) {
  runsOrError(filter: {tags: [{key: $tag, value: $value}]}) {
    ... on Runs { results { runId status } }
  }
}
"""


@pytest.fixture(scope="session")
def demo_summary(deployment: Deployment) -> dict:
    """`make demo` in effect: all three assets by `dagster asset materialize`."""
    return json.loads(deployment.cli("demo", "--json").stdout)


@pytest.mark.slow
def test_the_demo_materializes_all_three_assets_from_the_command_line(demo_summary: dict) -> None:
    assert demo_summary["ok"]
    steps = {one["step"]: one for one in demo_summary["executions"]}
    assert list(steps) == ["preprocess", "train", "evaluate"]
    assert {o["name"] for o in steps["train"]["outputs"]} == {"model.joblib"}
    assert {o["name"] for o in steps["evaluate"]["outputs"]} == {
        "confusion-matrix.png",
        "report.json",
    }
    assert steps["train"]["metrics"]["epoch"] == 20
    assert steps["evaluate"]["metrics"]["accuracy"] > 0.9
    assert steps["train"]["phases"]["running"] > 0


@pytest.mark.slow
def test_graphql_launches_the_training_with_parameters_of_its_own(
    app: DagsterApp, demo_summary: dict
) -> None:
    run_id = app.launch(LOCATION, [["digits", "train"]], config=FAST)
    assert app.finished(run_id).status == "SUCCESS"
    metadata = app.metadata(run_id, "train")
    assert metadata["metrics/epoch"] == 3
    assert metadata["commit"]


@pytest.mark.slow
def test_the_sensor_trains_once_for_each_request_file(
    app: DagsterApp, deployment: Deployment, demo_summary: dict
) -> None:
    selector = {
        "repositoryLocationName": LOCATION,
        "repositoryName": "__repository__",
        "sensorName": "retrain_on_request",
    }
    requests = deployment.state / "training-requests"
    requests.mkdir()
    (requests / "2026-01-05-a.json").write_text('{"epochs": 2}')
    answer = app.graphql(_START_SENSOR, selector=selector)["startSensor"]
    assert answer["__typename"] == "Sensor", answer

    def runs() -> list[dict]:
        found = app.graphql(_RUNS, tag="training-request", value="2026-01-05-a.json")
        return found["runsOrError"]["results"]

    wait_for(runs, seconds=90, every=0.5, what="the sensor's run")
    (run,) = runs()
    assert app.finished(run["runId"]).status == "SUCCESS"
    assert app.metadata(run["runId"], "train")["metrics/epoch"] == 2
    assert len(runs()) == 1


@pytest.mark.slow
def test_the_schedule_launches_the_whole_project(app: DagsterApp) -> None:
    selector = {
        "repositoryLocationName": LOCATION,
        "repositoryName": "__repository__",
        "scheduleName": "digits_nightly",
    }
    tick = app.graphql(_SCHEDULE, selector=selector)["scheduleDryRun"]
    assert tick["__typename"] == "DryRunInstigationTick", tick
    assert tick["evaluationResult"]["error"] is None
    assert len(tick["evaluationResult"]["runRequests"]) == 1
