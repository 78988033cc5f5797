"""The same three executions, started in each way that people start them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from tests.e2e.conftest import LOCATION, Deployment, Probe
from tests.support.dagster_app import DagsterApp
from tests.support.ports import wait_for

_SCHEDULE = """
mutation Tick($selector: ScheduleSelector!) {
  scheduleDryRun(selectorData: $selector, timestamp: 1767240000) {
    __typename
    ... on DryRunInstigationTick { evaluationResult { error { message } runRequests { runKey } } }
    ... on PythonError { message }
  }
}
"""
_SENSOR = """
mutation Tick($selector: SensorSelector!) {
  sensorDryRun(selectorData: $selector, cursor: null) {
    __typename
    ... on DryRunInstigationTick { evaluationResult { runRequests { runKey runConfigYaml } } }
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
def test_graphql_launches_a_step_with_parameters_of_its_own(app: DagsterApp, probe: Probe) -> None:
    metadata = app.metadata(probe.run("draw", parameters={"size": 5}), "draw")
    assert metadata["metrics/area"] == 25
    assert metadata["commit"]


@pytest.mark.slow
@pytest.mark.parametrize("home", ["with DAGSTER_HOME", "without DAGSTER_HOME"])
def test_dagster_asset_materialize_runs_a_step(
    home: str, deployment: Deployment, probe: Probe
) -> None:
    """The same records, Redis and service serve a command that knows nothing of the instance."""
    environment = dict(deployment.environment)
    if home.startswith("without"):
        del environment["DAGSTER_HOME"]
    size = len(home)
    config = {"ops": {"probe__draw": {"config": {"parameters": {"size": size}}}}}
    done = replace(deployment, environment=environment).run(
        *("dagster", "asset", "materialize", "--select", "key:probe/draw"),
        *("-m", "tests.e2e.probe.definitions", "--config-json", json.dumps(config)),
    )
    run_id = re.findall(r"([0-9a-f-]{36}) - \d+ - RUN_SUCCESS", done.stderr)[0]
    (line,) = deployment.cli("metrics", run_id, "--json").stdout.splitlines()
    assert json.loads(line)["values"]["area"] == size**2


@pytest.mark.slow
def test_a_sensor_launches_once_for_each_request(app: DagsterApp, deployment: Deployment) -> None:
    selector = {
        "repositoryLocationName": LOCATION,
        "repositoryName": "__repository__",
        "sensorName": "on_request",
    }
    requests = deployment.state / "probe-requests"
    requests.mkdir()
    (requests / "9").touch()
    answer = app.graphql(_START_SENSOR, selector=selector)["startSensor"]
    assert answer["__typename"] == "Sensor", answer

    def runs() -> list[dict]:
        return app.graphql(_RUNS, tag="probe", value="sensor")["runsOrError"]["results"]

    (run,) = wait_for(runs, seconds=60, every=0.5, what="the sensor's run")
    assert app.finished(run["runId"]).status == "SUCCESS"
    assert app.metadata(run["runId"], "draw")["metrics/area"] == 81
    assert len(runs()) == 1


@pytest.mark.slow
def test_the_example_s_sensor_asks_for_a_training_with_the_parameters_of_the_file(
    app: DagsterApp, deployment: Deployment
) -> None:
    selector = {
        "repositoryLocationName": LOCATION,
        "repositoryName": "__repository__",
        "sensorName": "retrain_on_request",
    }
    requests = deployment.state / "training-requests"
    requests.mkdir()
    (requests / "2026-01-05-a.json").write_text('{"epochs": 2}')
    tick = app.graphql(_SENSOR, selector=selector)["sensorDryRun"]
    (request,) = tick["evaluationResult"]["runRequests"]
    assert request["runKey"] == "2026-01-05-a.json"
    assert "epochs: 2" in request["runConfigYaml"]


@pytest.mark.slow
def test_a_schedule_fires(app: DagsterApp) -> None:
    """It is switched on with the app, see conftest; one run comes of all its ticks."""

    def runs() -> list[dict]:
        return app.graphql(_RUNS, tag="probe", value="schedule")["runsOrError"]["results"]

    (run,) = wait_for(runs, seconds=75, every=0.5, what="the schedule's run")
    assert app.finished(run["runId"]).status == "SUCCESS"
    assert app.metadata(run["runId"], "draw")["metrics/area"] == 400


@pytest.mark.slow
def test_the_nightly_schedule_asks_for_the_whole_project(app: DagsterApp) -> None:
    selector = {
        "repositoryLocationName": LOCATION,
        "repositoryName": "__repository__",
        "scheduleName": "digits_nightly",
    }
    tick = app.graphql(_SCHEDULE, selector=selector)["scheduleDryRun"]
    assert tick["__typename"] == "DryRunInstigationTick", tick
    assert tick["evaluationResult"]["error"] is None
    assert len(tick["evaluationResult"]["runRequests"]) == 1
