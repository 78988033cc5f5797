"""Retention of Dagster's event log on real instances: what the UI shows of assets stays."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import AssetCheckKey, AssetKey, DagsterEventType, DagsterInstance
from dagster_graphql.schema import create_schema
from typer.testing import CliRunner

from valohai_dagster import build_retention_sensor
from valohai_dagster.cli.retention import app
from valohai_dagster.errors import RefusedError
from valohai_dagster.executions.retention import Done
from valohai_dagster.executions.retention_rules import Plan
from valohai_dagster.plugin.compat.storage import passing_events
from valohai_dagster.plugin.retention import plan_events, remove_events
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings
from valohai_dagster.settings_retention import RetentionSettings

TABLE = AssetKey("table")
_HISTORY = """
query History($key: AssetKeyInput!) {
  assetOrError(assetKey: $key) {
    ... on Asset {
      assetMaterializations { runId metadataEntries { label } tags { key value } }
      assetObservations { runId }
    }
  }
}
"""


def _table(context) -> Iterator[Any]:  # Dagster resolves no textual annotation of it
    context.log.info("a line of the log")
    context.log_event(dg.AssetObservation("table", metadata={"seen": 1}))
    yield dg.MaterializeResult(
        metadata={"rows": 3}, check_results=[dg.AssetCheckResult(passed=True, check_name="rows")]
    )


table = dg.asset(
    name="table", code_version="1", check_specs=[dg.AssetCheckSpec("rows", asset="table")]
)(_table)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def instance(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DagsterInstance]:
    overrides: dict[str, Any] = {}
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
        overrides = {"storage": {"postgres": {"postgres_url": url}}}
    with dg.instance_for_test(overrides=overrides, temp_dir=str(tmp_path)) as found:
        yield found


@pytest.fixture
def records(settings: Settings) -> Iterator[Records]:
    found = open_records(settings)
    yield found
    found.close()


def kinds(instance: DagsterInstance, run_id: str) -> Counter[str]:
    records = instance.get_records_for_run(run_id, limit=1000).records
    events = [record.event_log_entry.dagster_event for record in records]
    return Counter(event.event_type_value if event else "line" for event in events)


def with_days(settings: Settings, **values: Any) -> Settings:
    return settings.model_copy(update={"retention": RetentionSettings(**values)})


def in_days(days: float) -> datetime:
    return datetime.now(timezone.utc) + timedelta(days=days)


def history(instance: DagsterInstance) -> Any:
    """What the asset's page shows."""
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import EmptyWorkspaceTarget

    with WorkspaceProcessContext(instance, EmptyWorkspaceTarget()) as process:
        context = process.create_request_context()
        found = asyncio.run(
            create_schema().execute_async(
                _HISTORY, context_value=context, variables={"key": {"path": ["table"]}}
            )
        )
    assert not found.errors
    return found.data


def test_asset_history_stays_and_the_rest_of_old_runs_goes(
    instance: DagsterInstance, records: Records, settings: Settings
) -> None:
    settings = with_days(settings, events_days=30)
    first = dg.materialize([table], instance=instance)
    before, counted = history(instance), kinds(instance, first.run_id)
    plan = Plan()
    plan_events(instance, records, settings, in_days(29), plan)
    assert plan.items == []
    plan_events(instance, records, settings, in_days(31), plan)
    (item,) = plan.items
    assert item.bytes > 0
    assert kinds(instance, first.run_id) == counted, "planning removes nothing"
    done = Done()
    remove_events(instance, records, settings, in_days(31), done)
    left = kinds(instance, first.run_id)
    assert done.counts["events"] == sum(counted.values()) - sum(left.values()) > 5
    assert set(left) == {
        "PIPELINE_START",
        "PIPELINE_SUCCESS",
        "ASSET_MATERIALIZATION_PLANNED",
        "ASSET_MATERIALIZATION",
        "ASSET_OBSERVATION",
        "ASSET_CHECK_EVALUATION_PLANNED",
        "ASSET_CHECK_EVALUATION",
    } & set(counted)
    assert history(instance) == before
    run = instance.get_run_by_id(first.run_id)
    assert run is not None
    assert run.is_success
    record = instance.get_asset_records([TABLE])[0].asset_entry.last_materialization_record
    assert record is not None
    assert record.run_id == first.run_id
    check = AssetCheckKey(TABLE, "rows")
    latest = instance.event_log_storage.get_latest_asset_check_execution_by_key([check])
    assert latest[check].status.value == "SUCCEEDED"


def test_work_goes_on_after_the_last_run_that_was_done(
    instance: DagsterInstance, records: Records, settings: Settings
) -> None:
    settings = with_days(settings, events_days=30, batch=2)
    runs = [dg.materialize([table], instance=instance).run_id for _ in range(5)]
    looks = 0
    while True:
        done = Done()
        remove_events(instance, records, settings, in_days(31), done)
        looks += 1
        if not done.cursors:
            break
    assert looks == 3
    assert all(passing_events(instance, run_id) == (0, 0) for run_id in runs)
    again = Done()
    remove_events(instance, records, settings, in_days(31), again)
    assert again.counts["events"] == 0


def test_runs_that_changed_at_one_moment_are_all_done(
    instance: DagsterInstance, records: Records, settings: Settings
) -> None:
    """A batch ends among them, twice, and others follow."""
    from dagster._core.storage.runs.schema import RunsTable

    settings = with_days(settings, events_days=30, batch=2)
    runs = [dg.materialize([table], instance=instance).run_id for _ in range(6)]
    storage: Any = instance.run_storage
    at_once = RunsTable.c.run_id.in_(runs[:5])
    with storage.connect() as connection:
        moment = connection.execute(
            RunsTable.select().with_only_columns(RunsTable.c.update_timestamp).where(at_once)
        ).scalars()
        change = RunsTable.update().where(at_once).values(update_timestamp=min(moment))
        connection.execute(change)
    for count in (2, 2, 2, 0):
        plan, done = Plan(), Done()
        plan_events(instance, records, settings, in_days(31), plan)
        remove_events(instance, records, settings, in_days(31), done)
        assert len(plan.items) == count
    assert not done.cursors
    assert all(passing_events(instance, run_id) == (0, 0) for run_id in runs)


def test_running_runs_are_left_alone(
    instance: DagsterInstance, records: Records, settings: Settings
) -> None:
    settings = with_days(settings, events_days=30)
    run = instance.create_run_for_job(
        dg.define_asset_job("j").resolve(asset_graph=dg.Definitions([table]).resolve_asset_graph())
    )
    instance.report_engine_event("at work", run)
    remove_events(instance, records, settings, in_days(99), Done())
    assert kinds(instance, run.run_id)[DagsterEventType.ENGINE_EVENT.value] == 1


def test_the_sensor_is_off_and_says_what_it_did(
    instance: DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "valohai.toml"
    config.write_text("[retention]\nlogs_days = 1\n")
    monkeypatch.setenv("VALOHAI_CONFIG", str(config))
    sensor = build_retention_sensor()
    assert sensor.default_status is dg.DefaultSensorStatus.STOPPED
    with dg.build_sensor_context(instance=instance) as context:
        found = sensor.evaluate_tick(context)
    assert found.skip_message == "removed nothing"
    assert found.cursor == "{}"


def test_the_command_says_when_nothing_is_set_and_what_may_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CliRunner()
    refused = runner.invoke(app, ["run", "--yes"])
    assert isinstance(refused.exception, RefusedError)
    config = tmp_path / "valohai.toml"
    config.write_text("[retention]\nlogs_days = 1\n")
    monkeypatch.setenv("VALOHAI_CONFIG", str(config))
    assert runner.invoke(app, ["plan"]).output == "Nothing may go.\n"
    done = runner.invoke(app, ["run", "--yes", "--json"])
    assert '"more": false' in done.output
