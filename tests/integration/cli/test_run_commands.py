"""`outputs` and `metrics` on real records and a real store."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from valohai_agent.protocol import utcnow
from valohai_dagster.cli.app import app
from valohai_dagster.cli.lookup import find_executions
from valohai_dagster.cli.metrics import metric_lines
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.executions.ledger import ensure_project
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings, load_settings
from valohai_dagster.stores.registry import open_stores

RUN = "0a1b2c3d-0000-4000-8000-000000000001"
TRAIN = "aaaa0000-0000-4000-8000-000000000001"
EVALUATE = "aaaa1111-0000-4000-8000-000000000002"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    return load_settings()


@pytest.fixture
def records(here: Settings) -> Records:
    """One run with two executions, three metric lines and two files."""
    records = open_records(here)
    with records.write() as conn:
        project = ensure_project(conn, "digits", utcnow())
        for number, (execution, step) in enumerate(((TRAIN, "train"), (EVALUATE, "evaluate")), 1):
            conn.execute(t.executions.insert().values(_execution(project, execution, step, number)))
        for number, loss in enumerate((0.5, 0.25, 0.125), 1):
            row = {"execution_id": TRAIN, "number": number, "attempt": 1, "time": utcnow()}
            conn.execute(t.metadata_events.insert().values({**row, "values": {"loss": loss}}))
        for execution, name in ((TRAIN, "model.bin"), (EVALUATE, "deep/er/report.json")):
            conn.execute(t.datums.insert().values(_datum(here, project, execution, name)))
    return records


def _execution(project: str, execution: str, step: str, number: int) -> dict[str, Any]:
    fixed = {"commit": "c0ffee", "group_name": "local", "image": "python", "spec": {}}
    times = {"ctime": utcnow(), "status": "complete"}
    key = {"id": execution, "project_id": project, "counter": number, "run_id": RUN, "step": step}
    return {**fixed, **times, **key}


def _datum(settings: Settings, project: str, execution: str, name: str) -> dict[str, Any]:
    content = name.encode()
    key = f"data/{execution}/{name}"
    open_stores(settings).get("local").put(key, content)
    return {
        "id": hashlib.md5(content).hexdigest(),
        "name": name,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "store": "local",
        "key": key,
        "project_id": project,
        "execution_id": execution,
        "ctime": utcnow(),
    }


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("reference", [RUN, "0a1b", "latest"])
def test_a_run_is_found_by_its_id_its_beginning_and_as_the_latest(
    records: Records, reference: str
) -> None:
    with records.read() as conn:
        assert find_executions(conn, reference) == [TRAIN, EVALUATE]


@pytest.mark.parametrize("reference", [TRAIN, f"exec-{TRAIN}", "digits#1", "#1", "aaaa0"])
def test_an_execution_is_found_by_its_id_and_its_number(records: Records, reference: str) -> None:
    with records.read() as conn:
        assert find_executions(conn, reference) == [TRAIN]


def test_an_ambiguous_beginning_is_refused_with_the_candidates(records: Records) -> None:
    with records.read() as conn, pytest.raises(RefusedError, match=TRAIN):
        find_executions(conn, "aaaa")


@pytest.mark.parametrize("reference", ["ffff", "abc", "other#1", "100%", ""])
def test_what_is_not_there_is_named(records: Records, reference: str) -> None:
    with records.read() as conn, pytest.raises(NotFoundError, match="no execution fits"):
        find_executions(conn, reference)


def test_an_unknown_step_is_answered_with_those_there_are(records: Records) -> None:
    with records.read() as conn, pytest.raises(NotFoundError, match="evaluate, train"):
        find_executions(conn, RUN, step="trian")


def test_outputs_are_listed_with_sizes_and_addresses(records: Records, here: Settings) -> None:
    listed = json.loads(run("outputs", "latest", "--json"))
    assert [(one["step"], one["name"]) for one in listed] == [
        ("train", "model.bin"),
        ("evaluate", "deep/er/report.json"),
    ]
    assert listed[0]["url"] == here.datum_url(listed[0]["id"])
    assert "model.bin" in run("outputs")


def test_downloads_keep_directories_and_leave_equal_files_alone(
    records: Records, tmp_path: Path
) -> None:
    target = tmp_path / "got"
    for _ in range(2):
        run("outputs", RUN, "--download", "--to", str(target))
    assert (target / "train-1" / "model.bin").read_text() == "model.bin"
    assert (target / "evaluate-2" / "deep" / "er" / "report.json").is_file()
    assert not list(target.rglob(".download-*"))


def test_a_download_never_replaces_something_else_unasked(records: Records, tmp_path: Path) -> None:
    target = tmp_path / "got"
    target.mkdir()
    (target / "model.bin").write_text("mine")
    arguments = ("outputs", "#1", "--download", "--to", str(target))
    with pytest.raises(RefusedError, match="--overwrite"):
        run(*arguments)
    assert (target / "model.bin").read_text() == "mine"
    run(*arguments, "--overwrite")
    assert (target / "model.bin").read_text() == "model.bin"


def test_metrics_come_in_order_once_each(records: Records) -> None:
    lines = [json.loads(line) for line in run("metrics", "latest", "--json").splitlines()]
    assert [line["values"]["loss"] for line in lines] == [0.5, 0.25, 0.125]


def test_following_ends_when_the_executions_have_ended_and_misses_nothing(
    records: Records,
) -> None:
    with records.write() as conn:
        conn.execute(t.executions.update().values(status="started"))

    def later(seconds: float) -> None:
        with records.write() as conn:
            row = {"execution_id": TRAIN, "number": 4, "attempt": 1, "time": utcnow()}
            conn.execute(t.metadata_events.insert().values({**row, "values": {"loss": 0.1}}))
            conn.execute(t.executions.update().values(status="complete"))

    lines = list(metric_lines(records, RUN, follow=True, sleep=later))
    assert [line.values["loss"] for line in lines] == [0.5, 0.25, 0.125, 0.1]
