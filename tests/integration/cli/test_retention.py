"""`valohai-dagster retention`: the table, the reasons, and removing it."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from valohai_agent.protocol import utcnow
from valohai_dagster.cli.retention import app
from valohai_dagster.errors import RefusedError
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import load_settings
from valohai_dagster.stores.registry import open_stores


@pytest.fixture
def old_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Key of the log of an execution that ended forty days ago."""
    config = tmp_path / "valohai.toml"
    config.write_text("[retention]\nlogs_days = 30\n")
    monkeypatch.setenv("VALOHAI_CONFIG", str(config))
    settings = load_settings()
    open_stores(settings).log.put("logs/e1/stdout", b"hello\n")
    log = {"store": "local", "key": "logs/e1/stdout", "size": 6, "lines": 1}
    then = utcnow() - timedelta(days=40)
    records = open_records(settings)
    with records.write() as conn:
        conn.execute(t.projects.insert().values(id="p", name="digits", counter=1, ctime=then))
        values = {"id": "e1", "project_id": "p", "counter": 1, "step": "train", "commit": "c"}
        more = {"group_name": "local", "image": "i", "spec": {}, "status": "complete"}
        conn.execute(t.executions.insert().values(**values, **more, ctime=then, ended_at=then))
        conn.execute(t.attempts.insert().values(execution_id="e1", number=1, logs={"stdout": log}))
    records.close()
    return log["key"]


def test_without_settings_the_plan_is_empty_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["plan"])
    assert (shown.exit_code, shown.stdout) == (0, "Nothing may go.\n")
    assert "the settings keep everything for ever" in shown.stderr
    data = json.loads(CliRunner().invoke(app, ["plan", "--json"]).stdout)
    assert data["kinds"] == {}
    refused = CliRunner().invoke(app, ["run", "--yes"])
    assert isinstance(refused.exception, RefusedError)


def test_the_plan_counts_and_says_why(old_log: str) -> None:
    shown = CliRunner().invoke(app, ["plan", "--items"])
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[0].split() == ["WHAT", "COUNT", "SIZE"]
    assert lines[1].split() == ["logs", "of", "attempts", "1", "6", "B"]
    assert "train #1, attempt 1 (digits): its execution ended 40 days ago" in lines[2]
    data = json.loads(CliRunner().invoke(app, ["plan", "--json"]).output)
    assert data["kinds"] == {"logs": {"count": 1, "bytes": 6}}
    assert open_stores(load_settings()).log.stat(old_log) is not None


def test_run_removes_it_and_a_second_one_finds_nothing(old_log: str) -> None:
    done = CliRunner().invoke(app, ["run", "--yes", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["kinds"] == {"logs": {"count": 1, "bytes": 6}}
    assert open_stores(load_settings()).log.stat(old_log) is None
    again = CliRunner().invoke(app, ["run", "--yes"])
    assert again.output == "Nothing was removed.\n"
