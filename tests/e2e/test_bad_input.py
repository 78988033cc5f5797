"""What people do wrong, and what Dagster then tells them: the thing, and what to do next."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.e2e.conftest import Deployment, Probe
from tests.support.dagster_app import DagsterApp, GraphQLError
from tests.support.ports import free_port

pytestmark = pytest.mark.slow

# name -> step, its config, and what the failure must say
FAILING = {
    "a value out of bounds": (
        "draw",
        {"parameters": {"size": 999}},
        ("parameter `size`: 999 is greater than the maximum allowed (64)", "launch again"),
    ),
    "an input that nobody made yet": (
        "follows-never",
        {},
        ("input `picture` has no value: its upstream `never-run`", "materialize that first"),
    ),
    "an unknown alias": (
        "needs-input",
        {"inputs": {"table": ["datum://no-such-alias"]}},
        ("input 'table': datum://no-such-alias", "valohai-dagster data put --alias"),
    ),
    "a command that is not there": (
        "no-such-command",
        {},
        ("exit code 127", "no-such-program", "Check its name, and that"),
    ),
    "an exit code": (
        "exit-three",
        {},
        ("exit code 3", "cannot open the gate", "stdout and stderr tabs"),
    ),
}


@pytest.fixture(scope="module")
def failures(probe: Probe, app: DagsterApp) -> dict[str, str]:
    """The failure message of each, all launched at once."""
    runs = {name: probe.launch(step, **config) for name, (step, config, _) in FAILING.items()}
    states = {name: app.finished(run_id).status for name, run_id in runs.items()}
    assert states == dict.fromkeys(FAILING, "FAILURE")
    return {name: app.failure(run_id) for name, run_id in runs.items()}


@pytest.mark.parametrize("name", FAILING)
def test_the_step_failure_names_the_thing_and_the_next_step(
    failures: dict[str, str], name: str
) -> None:
    for part in FAILING[name][2]:
        assert part in failures[name]


def test_an_unknown_parameter_is_refused_at_launch_by_its_name(probe: Probe) -> None:
    with pytest.raises(GraphQLError, match=r'unexpected config entry "sise".*parameters'):
        probe.launch("draw", parameters={"sise": 9})


def test_a_missing_required_input_is_refused_at_launch_by_its_name(probe: Probe) -> None:
    with pytest.raises(GraphQLError, match=r'Missing required config entry .*"inputs"'):
        probe.launch("needs-input")


def test_a_choice_that_does_not_exist_is_refused_at_launch(probe: Probe) -> None:
    with pytest.raises(GraphQLError, match="colour"):
        probe.launch("draw", parameters={"colour": "blue"})


def test_redis_down_at_launch_fails_the_step_with_where_it_is_and_what_to_do(
    app: DagsterApp, deployment: Deployment
) -> None:
    url = f"redis://someone:hidden-word@127.0.0.1:{free_port()}/0"
    environment = {**deployment.environment, "VALOHAI_REDIS_URL": url}
    done = replace(deployment, environment=environment).run(
        *("dagster", "asset", "materialize", "--select", "key:probe/draw"),
        *("-m", "tests.e2e.probe.definitions"),
        check=False,
    )
    assert done.returncode != 0
    latest = "{ runsOrError(limit: 1) { ... on Runs { results { runId } } } }"
    (run,) = app.graphql(latest)["runsOrError"]["results"]
    failure = app.failure(run["runId"])
    for part in ("Redis at redis://someone:***@127.0.0.1", "check redis_url", "doctor"):
        assert part in failure
    assert "hidden-word" not in json.dumps(app.events(run["runId"])) + done.stdout + done.stderr
