"""Machines end to end: containers that bootstrap themselves by the real script from the published agent file, join with
their token, run executions of Dagster runs, are cut off and killed, and go when there is nothing to do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import LOCATION, ROOT
from tests.support.dagster_app import DagsterApp
from tests.support.deployment import Deployment
from tests.support.machines import (
    GROUP,
    agent_file,
    control_plane,
    group_section,
    host_address,
    network,
)
from tests.support.ports import wait_for

if TYPE_CHECKING:
    import docker
    from playwright.sync_api import Page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(175)]

MACHINES = 3
LOAD_MS = 30_000
_WORKSPACE = """
load_from:
  - python_module:
      {{module_name: tests.e2e.probe.definitions, working_directory: {root}, location_name: valohai}}
"""


@dataclass(frozen=True, kw_only=True)
class Site:
    deployment: Deployment
    app: DagsterApp
    docker: docker.DockerClient
    network: Any

    def launch(self, steps: int) -> str:
        config = {
            "ops": {
                "probe__count": {
                    "config": {
                        "environment": GROUP,
                        "parameters": {"steps": steps, "pause": 0.5},
                    }
                }
            }
        }
        return self.app.launch(LOCATION, [["probe", "count"]], config=config)

    def machine_of(self, run_id: str) -> str:
        """The container on which the run's step computes by now."""

        def found() -> str | None:
            for message in self.app.messages(run_id):
                if "leased by worker" in message:
                    return message.partition(" on ")[2].split()[0]
            return None

        machine = wait_for(found, seconds=60, every=0.3, what="a worker for the run")
        assert machine is not None
        return machine

    def containers(self) -> list[Any]:
        return self.docker.containers.list(filters={"label": f"valohai-group={GROUP}"})

    def ended(self) -> dict[str, str] | None:
        """Why each machine went; None while one is not known to be gone."""
        told = json.loads(self.cli("machines", "ls", "--json", "--all"))
        gone = all(one["state"] == "gone" for one in told)
        return {one["machine"]: one["reason"] for one in told} if gone else None

    def logs(self) -> str:
        every = self.docker.containers.list(all=True, filters={"label": f"valohai-group={GROUP}"})
        return "\n".join(one.logs().decode()[-1500:] for one in every)

    def cli(self, *arguments: str) -> str:
        return self.deployment.done("valohai_dagster", *arguments)


@pytest.fixture
def site(docker_client: docker.DockerClient, docker_image: str, tmp_path: Path) -> Iterator[Site]:
    address = host_address(docker_client)
    with network(docker_client) as net, control_plane(address, tmp_path) as (_, toml):
        group = group_section(
            docker_image,
            net.name,
            max_machines=MACHINES,
            scale_down_grace_seconds=1,
            boot_seconds=60,
        )
        settings = "lost_grace_seconds = 1\n" + toml + group
        with Deployment(tmp_path / "deployment", settings) as deployment:
            deployment.done("valohai_dagster", "agents", "publish", str(agent_file(tmp_path)))
            deployment.start_conductor()
            with _dagster(deployment) as app:
                yield Site(deployment=deployment, app=app, docker=docker_client, network=net)


def _dagster(deployment: Deployment) -> DagsterApp:
    home = deployment.root / "dagster"
    home.mkdir()
    (home / ".nux").mkdir()
    (home / ".nux" / "nux.yaml").write_text("seen: 1\n")
    shutil.copyfile(ROOT / "dagster.yaml", home / "dagster.yaml")
    workspace = deployment.root / "workspace.yaml"
    workspace.write_text(_WORKSPACE.format(root=ROOT))
    environment = {"VALOHAI_CONFIG": str(deployment.config), "PYTHONWARNINGS": "ignore"}
    return DagsterApp(home, workspace, environment=environment, cwd=ROOT, daemon=False)


def test_machines_come_run_are_cut_off_and_killed_and_go(
    site: Site, page: Page, artifacts: Path
) -> None:
    runs = [site.launch(steps=16) for _ in range(MACHINES)]
    machines = [site.machine_of(run) for run in runs]
    assert len(set(machines)) == MACHINES, machines
    whole, cut, killed = runs
    site.network.disconnect(machines[1], force=True)
    site.docker.containers.get(machines[2]).kill()

    assert site.app.finished(whole).status == "SUCCESS", site.logs()
    assert site.app.finished(killed, seconds=60).status == "SUCCESS", site.app.messages(killed)
    said = " ".join(site.app.messages(killed))
    assert f"machine {machines[2]} is gone" in said
    assert site.app.finished(cut, seconds=90).status == "SUCCESS", site.app.messages(cut)
    assert "no sign of life from worker" in " ".join(site.app.messages(cut))
    site.network.connect(
        machines[1]
    )  # it is told that its attempt is over, and goes like the others

    for run in runs:
        done = [e for e in site.app.events(run) if e["__typename"] == "MaterializationEvent"]
        assert len(done) == 1
    wait_for(lambda: not site.containers(), seconds=45, every=0.3, what="no machine any more")
    told = wait_for(site.ended, seconds=30, every=0.5, what="the records to say so")
    assert told is not None
    assert told[machines[2]] == "the cloud has ended it"
    assert told[machines[0]] == told[machines[1]] == "its workers have drained"

    page.goto(f"{site.app.url}/runs/{killed}", timeout=LOAD_MS)
    lost = page.get_by_text(f"machine {machines[2]} is gone").first
    lost.wait_for(timeout=LOAD_MS)
    lost.scroll_into_view_if_needed()
    page.screenshot(path=artifacts / "machine-lost.png")
