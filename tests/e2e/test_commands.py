"""The command line on the same state as the UI: outputs, metrics, doctor, data and secrets."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Deployment, Probe
from tests.support.dagster_app import DagsterApp
from tests.support.ports import wait_for

pytestmark = pytest.mark.slow

SECRET = "tok-8c1f-plain-to-see"


@pytest.fixture(scope="module")
def drawn(probe: Probe) -> str:
    return probe.run("draw", parameters={"size": 12})


def test_an_output_opens_at_its_address_and_downloads_by_command(
    app: DagsterApp, deployment: Deployment, drawn: str, tmp_path: Path
) -> None:
    (listed,) = json.loads(deployment.cli("outputs", drawn, "--json").stdout)
    assert app.metadata(drawn, "draw")["file/square.png"] == listed["url"]
    content = httpx.get(listed["url"]).content
    assert content.startswith(b"\x89PNG")
    deployment.cli("outputs", drawn, "--download", "--to", str(tmp_path))
    assert (tmp_path / "square.png").read_bytes() == content


def test_metrics_are_followed_while_the_command_runs(
    app: DagsterApp, deployment: Deployment, probe: Probe
) -> None:
    run_id = probe.launch("count", parameters={"steps": 8, "pause": 0.5})
    wait_for(lambda: app.log(run_id).stdout, seconds=60, every=0.2, what="the first line")
    follower = subprocess.Popen(
        [sys.executable, "-m", "valohai_dagster", "metrics", run_id, "--follow", "--json"],
        cwd=deployment.cwd,
        env={**os.environ, **deployment.environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout is not None
    first = json.loads(follower.stdout.readline())
    assert first["values"] == {"step": 1, "loss": 1}
    assert app.run(run_id).status == "STARTED"
    rest = [json.loads(line)["values"]["step"] for line in follower.stdout]
    assert rest == list(range(2, 9))
    follower.stdout.close()
    assert follower.wait(30) == 0


def test_the_doctor_finds_everything_well(deployment: Deployment, drawn: str) -> None:
    findings = json.loads(deployment.cli("doctor", "--json").stdout)
    assert {finding["level"] for finding in findings} <= {"ok", "note"}, findings


def test_an_uploaded_file_is_found_by_its_alias_in_a_launched_step(
    app: DagsterApp, deployment: Deployment, probe: Probe, tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("a,b\n1,2\n")
    deployment.cli("data", "put", str(table), "--project", "probe", "--alias", "the-table")
    listed = json.loads(deployment.cli("data", "ls", "--project", "probe", "--json").stdout)
    assert ["the-table"] in [datum["aliases"] for datum in listed]
    run_id = probe.run("needs-input", inputs={"table": ["datum://the-table"]})
    assert app.log(run_id).stdout == "a,b\n1,2\n"
    copy = tmp_path / "copy.csv"
    deployment.cli("data", "get", "the-table", "--project", "probe", "--output", str(copy))
    assert copy.read_text() == table.read_text()


def set_secret(deployment: Deployment, value: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "valohai_dagster", "secrets", "set", "probe-secrets", "PROBE_TOKEN"],
        cwd=deployment.cwd,
        env={**os.environ, **deployment.environment},
        input=value,
        text=True,
        check=True,
        capture_output=True,
    )


def test_v28_a_secret_that_user_code_prints_is_masked_and_stands_nowhere(
    app: DagsterApp, deployment: Deployment, probe: Probe
) -> None:
    """Every file of the deployment is searched: records, Redis, stored logs, Dagster's databases."""
    set_secret(deployment, SECRET)
    assert SECRET not in deployment.cli("secrets", "ls", "--json").stdout
    run_id = probe.run("leak")
    log = app.log(run_id)
    assert "the token is ***" in log.stdout
    assert "and again: ***" in log.stderr
    metadata = app.metadata(run_id, "leak")
    assert (metadata["metrics/token"], metadata["metrics/length"]) == ("***", len(SECRET))
    (output,) = json.loads(deployment.cli("outputs", run_id, "--json").stdout)
    assert httpx.get(output["url"]).text == str(len(SECRET))  # the command did have it
    assert files_with(deployment.state, SECRET.encode()) == []
    assert SECRET not in json.dumps(app.events(run_id))
    deployment.cli("secrets", "rm", "probe-secrets", "PROBE_TOKEN")
    assert json.loads(deployment.cli("secrets", "ls", "--json").stdout) == []


def files_with(directory: Path, text: bytes) -> list[Path]:
    found = []
    for path in directory.rglob("*"):
        if not path.is_file() or path.is_symlink():
            continue
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        if text in content:
            found.append(path)
    return found
