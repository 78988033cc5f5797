"""One deployment for the whole session: webserver, daemon, service, agents, on the checkout's own code location.

Its state directory and DAGSTER_HOME are temporary; valohai.toml is the checkout's (process runtime). Steps get their
packages from this interpreter's environment where possible, so that no test depends on a package index.
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

import pytest

from tests.support.dagster_app import DagsterApp

ROOT = Path(__file__).resolve().parents[2]
COMMAND_SECONDS = 170.0


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
    made = make_deployment(state)
    try:
        yield made
    finally:
        made.cli("down", check=False)
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(scope="session")
def app(deployment: Deployment) -> Iterator[DagsterApp]:
    """The checkout's workspace in a webserver and a daemon."""
    with DagsterApp(
        deployment.home, ROOT / "workspace.yaml", environment=deployment.environment, cwd=ROOT
    ) as running:
        yield running


@pytest.fixture
def project_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "project"
    directory.mkdir()
    return directory
