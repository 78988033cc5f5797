"""`valohai-dagster why` on real records, a real Redis and a Dagster instance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.run_queue import RunQueue
from tests.support.service import RunningService, make_spec, running_service
from valohai_dagster.cli.app import app
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.settings import load_settings


@pytest.fixture
def service(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunningService]:
    (tmp_path / "valohai.toml").write_text('[groups.local]\nkind = "static"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALOHAI_REDIS_URL", redis_server.unix_url)
    with running_service(load_settings()) as service:
        yield service


@pytest.fixture
def queue(service: RunningService, tmp_path: Path) -> Iterator[RunQueue]:
    with RunQueue.open(tmp_path) as queue:
        yield queue


def queued(service: RunningService, **values: Any) -> str:
    spec = make_spec(**values)
    service.client.submit(spec)

    def look() -> bool:
        view = service.client.view(spec.execution_id)
        return view is not None and view.status.value == "queued"

    wait_for(look, seconds=10, what="the execution in the queue")
    return spec.execution_id


def why(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["why", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("form", ["{id}", "exec-{id}", "{prefix}", "#1", "digits#1"])
def test_an_execution_by_its_id_its_beginning_or_its_number(
    service: RunningService, form: str
) -> None:
    execution = queued(service)
    text = why(form.format(id=execution, prefix=execution[:6]))
    assert text.splitlines() == [
        "digits#1 train: no worker of group local has checked in",
        "  next: start one with `valohai-agent run --queue local`, or choose another environment",
    ]


def test_as_json(service: RunningService) -> None:
    execution = queued(service)
    found = json.loads(why("#1", "--json"))
    assert found["run"] is None
    (one,) = found["executions"]
    assert (one["execution"], one["state"], one["ahead"]) == (execution, "no-worker", 0)


def test_a_run_without_its_dagster_instance_tells_of_its_executions(
    service: RunningService,
) -> None:
    queued(service, run_id="0a1b2c3d-0000-4000-8000-000000000001")
    text = why("0a1b2")
    assert "digits#1 train: no worker" in text
    assert "DAGSTER_HOME" in text
    assert why("latest") == text == why()


def test_a_run_is_told_step_by_step(queue: RunQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", queue.instance.root_directory)
    run = queue.launch("plain")
    assert why(run.run_id[:8]).startswith(f"run {run.run_id[:8]}: in Dagster's run queue, and no")
    assert json.loads(why(run.run_id, "--json"))["state"] == "no-daemon"


def test_short_ids_of_runs_must_fit_one(queue: RunQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", queue.instance.root_directory)
    for number in range(2):
        queue.instance.create_run_for_job(
            _nothing(), run_id=f"abcdef0{number}-0000-4000-8000-000000000000"
        )
    with pytest.raises(RefusedError, match="write more of the id"):
        why("abcdef0")
    assert why("abcdef01").startswith("run abcdef01: created")


def test_what_is_not_there_is_named(service: RunningService) -> None:
    with pytest.raises(NotFoundError, match="no execution fits 'ffff'"):
        why("ffff")


def _nothing() -> Any:
    import dagster as dg

    @dg.job
    def nothing() -> None: ...

    return nothing
