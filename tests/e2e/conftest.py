"""One deployment for the whole session: webserver, daemon, service, agents, and everything reached by its doors.

Its state directory and DAGSTER_HOME are temporary. valohai.toml and `definitions` are the checkout's (process
runtime); added are the worker groups `docker` and `pretend`, and the project `probe`, whose steps need no packages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.dagster_app import REPOSITORY, DagsterApp

ROOT = Path(__file__).resolve().parents[2]
COMMAND_SECONDS = 170.0
ARTIFACTS = ROOT / ".test-artifacts"  # screenshots of the last run
LOCATION = "valohai"
# A group whose machines come when there is work: a cloud that is not there, agents of this host for its machines.
PRETEND = '{"kind": "simulated", "runtime": "process", "max_machines": 2, "boot_delay_seconds": 0.2, "scale_down_grace_seconds": 3}'
_WORKSPACE = """
load_from:
  - python_module:
      {{module_name: tests.e2e.probe.definitions, working_directory: {root}, location_name: valohai}}
"""
_START_SCHEDULE = """
mutation Start($selector: ScheduleSelector!) {
  startSchedule(scheduleSelector: $selector) { __typename ... on PythonError { message } }
}
"""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A state directory with its environment; `run` starts commands in it as a user would."""

    state: Path
    environment: dict[str, str] = field(repr=False)
    cwd: Path = ROOT

    @property
    def home(self) -> Path:
        return self.state / "dagster"

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.cwd,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
        return done

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("valohai_dagster", *arguments, check=check)


def make_deployment(state: Path, *, cwd: Path = ROOT, **variables: str) -> Deployment:
    """With the checkout's dagster.yaml; `variables` are added to the environment."""
    environment = {
        "VALOHAI_STATE": str(state),
        "DAGSTER_HOME": str(state / "dagster"),
        "DAGSTER_DISABLE_TELEMETRY": "yes",
        "PYTHONWARNINGS": "ignore",
        "VALOHAI_HTTP_PORT": "0",
        **variables,
    }
    (state / "dagster").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / "dagster.yaml", state / "dagster" / "dagster.yaml")
    return Deployment(state=state, environment=environment, cwd=cwd)


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    state = Path(tempfile.mkdtemp(prefix="vte-", dir="/tmp"))
    made = make_deployment(
        state, VALOHAI_GROUPS__docker__RUNTIME="docker", VALOHAI_GROUPS__pretend=PRETEND
    )
    nux = made.home / ".nux"  # Dagster's community dialog would cover the page
    nux.mkdir()
    (nux / "nux.yaml").write_text("seen: 1\n")
    (state / "workspace.yaml").write_text(_WORKSPACE.format(root=ROOT))
    try:
        yield made
    finally:
        made.cli("down", check=False)
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(scope="session")
def app(deployment: Deployment) -> Iterator[DagsterApp]:
    """`dagster dev` with all of it. The probe's schedule is on from the start, so that no test waits a minute for it."""
    workspace = deployment.state / "workspace.yaml"
    with DagsterApp(
        deployment.home, workspace, environment=deployment.environment, cwd=ROOT, dev=True
    ) as running:
        selector = {
            "repositoryLocationName": LOCATION,
            "repositoryName": REPOSITORY,
            "scheduleName": "every_minute",
        }
        answer = running.graphql(_START_SCHEDULE, selector=selector)["startSchedule"]
        assert answer["__typename"] == "ScheduleStateResult", answer
        yield running


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Launches steps of the probe project through GraphQL.

    They run in the run's own process, which starts sooner; the launches of digits use Dagster's default executor.
    """

    app: DagsterApp

    def launch(self, step: str, **config: Any) -> str:
        name = step.replace("-", "_")
        run_config = {
            "ops": {f"probe__{name}": {"config": config}},
            "execution": {"config": {"in_process": {}}},
        }
        return self.app.launch(LOCATION, [["probe", name]], config=run_config)

    def run(self, step: str, **config: Any) -> str:
        """The id of a run that has succeeded."""
        run_id = self.launch(step, **config)
        state = self.app.finished(run_id)
        assert state.status == "SUCCESS", self.app.messages(run_id)[-10:]
        return run_id


@pytest.fixture(scope="session")
def probe(app: DagsterApp) -> Probe:
    return Probe(app=app)


@pytest.fixture(scope="session")
def artifacts() -> Path:
    ARTIFACTS.mkdir(exist_ok=True)
    return ARTIFACTS
