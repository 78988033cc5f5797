"""One Postgres database for Dagster's storage and our records; the rest embedded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.support.deployment import Deployment
from tests.support.projects import step_yaml, write_project
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import make_engine

ROOT = Path(__file__).parents[3]
DEFINITIONS = """
from valohai_dagster import load_valohai_project

defs = load_valohai_project({project!r}, name="tiny")
"""


def dagster_yaml() -> str:
    """The checkout's own with the storage that docs/production.md tells to add."""
    page = (ROOT / "docs" / "production.md").read_text()
    (storage,) = re.findall(r"```yaml\n(storage:.*?)```", page, re.DOTALL)
    return (ROOT / "dagster.yaml").read_text() + "\n" + storage


@pytest.fixture
def deployment(tmp_path: Path, postgres_url: str, namespaces: None):
    toml = """
    http_port = 0
    idle_exit_seconds = 30
    [groups.local]
    runtime = "process"
    slots = 1
    """
    with Deployment(tmp_path / "deployment", toml) as deployment:
        yield deployment
        deployment.down()


def test_a_materialization_leaves_its_events_and_our_records_in_one_database(
    deployment: Deployment, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "dagster-home"
    home.mkdir()
    (home / "dagster.yaml").write_text(dagster_yaml())
    project = write_project(
        tmp_path / "project", step_yaml("echo fine > /valohai/outputs/fine.txt", "echo hello")
    )
    definitions = tmp_path / "tiny_definitions.py"
    definitions.write_text(DEFINITIONS.format(project=str(project)))
    monkeypatch.setenv("VALOHAI_DATABASE_URL", postgres_url)
    monkeypatch.setenv("DAGSTER_DATABASE_URL", postgres_url)
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    command = ("dagster", "asset", "materialize", "--select", "tiny/run", "-f", str(definitions))
    deployment.done(*command)

    engine = make_engine(postgres_url)
    try:
        tables = set(sa.inspect(engine).get_table_names())
        assert {"vh_executions", "vh_datums", "event_logs", "runs", "alembic_version"} <= tables
        with engine.connect() as conn:
            ours = conn.execute(sa.select(t.executions)).one()
            assert ours.status == "complete"
            assert conn.execute(sa.select(t.datums.c.name)).scalars().all() == ["fine.txt"]
            query = "SELECT run_id FROM event_logs WHERE dagster_event_type = :kind"
            found = conn.execute(sa.text(query), {"kind": "ASSET_MATERIALIZATION"}).scalar_one()
            assert found == ours.run_id
    finally:
        engine.dispose()
    assert not list(home.rglob("*.db"))
    assert not (deployment.settings.state_dir / "records.db").exists()
    said = deployment.done("valohai_dagster", "doctor")
    assert "(postgresql)" in said
