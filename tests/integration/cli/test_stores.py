"""`valohai-dagster stores sweep` beside a running service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from typer.testing import CliRunner

from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service, static_settings
from valohai_agent import protocol as p
from valohai_dagster.cli import stores
from valohai_dagster.executions import sweeping
from valohai_dagster.settings import Settings

RUNNER = CliRunner()


@pytest.fixture
def service(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningService]:
    monkeypatch.setattr(sweeping, "SWEEP_SECONDS", 3600.0)
    monkeypatch.setenv("VALOHAI_SWEEP_AFTER_SECONDS", "0")
    with running_service(static_settings(settings, grant_seconds=0.01)) as service:
        yield service


@pytest.fixture
def left(service: RunningService, redis_server: RedisServer) -> Path:
    """A file that a finished execution uploaded and did not report."""
    spec = make_spec()
    service.client.submit(spec)
    lease = service.agent(redis_server).take()
    lease.leased()
    lease.wait_grants()
    grant = lease.want(p.GrantRequest(id="1", kind="output", name="left", size=1)).uploads["1"]
    path = Path(unquote(urlsplit(grant.transfer.url).path))
    path.write_bytes(b"x")
    lease.store("kept", b"12345")
    lease.finish()
    service.final(spec.execution_id)
    return path


def run(*arguments: str) -> str:
    result = RUNNER.invoke(stores.app, ["sweep", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_dry_run_shows_what_would_go_and_removes_nothing(left: Path):
    (upload,) = json.loads(run("--dry-run", "--json"))["uploads"]
    assert (upload["name"], upload["store"], upload["removed"]) == ("left", "local", False)
    assert left.as_posix().endswith(upload["key"])
    assert upload["key"] in run("--dry-run")
    assert left.exists()


def test_a_sweep_removes_it_and_the_next_one_finds_nothing(left: Path):
    (upload,) = json.loads(run("--json"))["uploads"]
    assert upload["removed"]
    assert not left.exists()
    assert json.loads(run("--json"))["uploads"] == []
