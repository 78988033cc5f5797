"""Events that were stored in part, on both storages: what is missing is done, and done once (DAGSTER_NOTES 9)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, EventLogEntry
from sqlalchemy import exc

from valohai_dagster.plugin.compat import storage
from valohai_dagster.plugin.driver.events import RunEvents, StepEvents
from valohai_dagster.plugin.driver.recovery import complete_last_event

KEY = dg.AssetKey("a")


@dg.asset(key=KEY)
def a(): ...


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def instance(request: pytest.FixtureRequest) -> Iterator[DagsterInstance]:
    overrides: dict[str, Any] = {}
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
        overrides["storage"] = {"postgres": {"postgres_url": url}}
    with dg.instance_for_test(overrides=overrides) as found:
        storage.pooled(found, 2)
        storage.steady_schema(found)
        yield found
        storages: Any = (found.run_storage, found.event_log_storage)
        for one in storages:
            with contextlib.suppress(AttributeError):
                one._engine.dispose()


class Killed(Exception):
    pass


@contextlib.contextmanager
def dying_at(owner: Any, method: str) -> Iterator[None]:
    """The process ends where this method would begin."""

    def die(*args: Any, **values: Any) -> None:
        raise Killed

    original = getattr(owner, method)
    setattr(owner, method, die)
    try:
        with pytest.raises(Killed):
            yield
    finally:
        setattr(owner, method, original)


def made(instance: DagsterInstance) -> tuple[DagsterRun, StepEvents]:
    job = dg.Definitions(assets=[a]).resolve_implicit_global_asset_job_def()
    run = instance.create_run_for_job(job)
    from dagster._core.execution.api import create_execution_plan

    step: Any = create_execution_plan(job).get_step_by_key("a")
    return run, StepEvents(run.job_name, run.run_id, step, {})


def materialization(events: StepEvents) -> EventLogEntry:
    tags = {"dagster/data_version": "v1", "dagster/code_version": "c"}
    made = dg.AssetMaterialization(asset_key=KEY, metadata={"x": 1}, tags=tags)
    return events.materialization(made)[0]


def shown(instance: DagsterInstance) -> str | None:
    """The run of the materialization that the asset's page shows as the latest."""
    for record in instance.get_asset_records([KEY]):
        latest = record.asset_entry.last_materialization_record
        return latest.run_id if latest else None
    return None


def rows(instance: DagsterInstance, run: DagsterRun, kind: DagsterEventType) -> int:
    return len(instance.get_records_for_run(run.run_id, of_type=kind).records)


def data_version_tags(instance: DagsterInstance) -> int:
    found: Any = instance.event_log_storage
    with found.index_connection() as connection:
        return connection.execute(
            sa.text("SELECT count(*) FROM asset_event_tags WHERE key = 'dagster/data_version'")
        ).scalar()


@pytest.mark.parametrize("repairs", [1, 2])
def test_a_materialization_reaches_the_assets_page(instance: DagsterInstance, repairs: int) -> None:
    run, events = made(instance)
    entry = materialization(events)
    with dying_at(instance.event_log_storage, "_store_asset_event_tags"):
        instance.handle_new_event(entry)
    assert data_version_tags(instance) == 0
    for _ in range(repairs):
        assert complete_last_event(instance, entry)
    assert shown(instance) == run.run_id
    assert rows(instance, run, DagsterEventType.ASSET_MATERIALIZATION) == 1
    assert data_version_tags(instance) == 1


def test_a_whole_materialization_is_left_as_it_is(instance: DagsterInstance) -> None:
    _, events = made(instance)
    entry = materialization(events)
    instance.handle_new_event(entry)
    assert complete_last_event(instance, entry)
    assert data_version_tags(instance) == 1


def test_the_end_of_a_run_reaches_its_status(instance: DagsterInstance) -> None:
    run, _ = made(instance)
    (entry,) = RunEvents(run.job_name, run.run_id).success()
    with dying_at(instance.run_storage, "handle_run_event"):
        instance.handle_new_event(entry)
    assert complete_last_event(instance, entry)
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    assert found.status is DagsterRunStatus.SUCCESS
    assert rows(instance, run, DagsterEventType.RUN_SUCCESS) == 1


def test_an_event_that_was_never_stored_is_not_found(instance: DagsterInstance) -> None:
    _, events = made(instance)
    assert not complete_last_event(instance, materialization(events))
    assert not complete_last_event(instance, events.engine("hello")[0])


def test_events_that_touch_the_log_only_are_stored_together_in_order(
    instance: DagsterInstance,
) -> None:
    run, events = made(instance)
    batch = [
        *events.logs_captured([run.run_id, "compute_logs", "a"], {}),
        *events.worker_starting("queued"),
        *events.start(0),
        *events.engine("running"),
        *events.abandoned(["b"], []),
    ]
    assert all(map(storage.touches_log_only, batch))
    storage.store_together(instance, batch)
    records = instance.get_records_for_run(run.run_id).records[-len(batch) :]
    assert [record.event_log_entry for record in records] == batch


def test_events_of_assets_and_runs_are_stored_alone(instance: DagsterInstance) -> None:
    run, events = made(instance)
    assert not storage.touches_log_only(materialization(events))
    assert not storage.touches_log_only(RunEvents(run.job_name, run.run_id).success()[0])


def test_a_plain_line_is_found_again(instance: DagsterInstance) -> None:
    _, events = made(instance)
    (line,) = events.abandoned(["b"], [])
    instance.handle_new_event(line)
    assert complete_last_event(instance, line)


@pytest.mark.parametrize(
    ("error", "outage"),
    [
        (exc.OperationalError("", {}, Exception("away")), True),
        (exc.InterfaceError("", {}, Exception("away")), True),
        (exc.IntegrityError("", {}, Exception("twice")), False),
        (ValueError("boom"), False),
    ],
)
def test_only_a_database_that_is_away_is_waited_for(error: Exception, *, outage: bool) -> None:
    assert storage.is_database_outage(error) is outage


def test_a_refused_connection_to_postgres_is_an_outage() -> None:
    utils = pytest.importorskip("dagster_postgres.utils")
    make: Callable[[], Exception] = utils.DagsterPostgresException
    assert storage.is_database_outage(make())


def test_passing_events_are_those_that_no_asset_check_or_run_state_needs(
    instance: DagsterInstance,
) -> None:
    """Which is what `plugin.retention` removes; its own tests look at what is left."""
    result = dg.materialize([a], instance=instance)
    count, size = storage.passing_events(instance, result.run_id)
    records = instance.get_records_for_run(result.run_id, limit=1000).records
    assert 0 < count < len(records)
    assert size > 0
    assert storage.passing_events(instance, result.run_id, remove=True) == (count, size)
    assert storage.passing_events(instance, result.run_id) == (0, 0)
    left = instance.get_records_for_run(result.run_id, limit=1000).records
    assert len(left) == len(records) - count
    assert storage.passing_events(instance, "no-such-run") == (0, 0)


def test_finished_runs_come_in_the_order_of_their_last_change(instance: DagsterInstance) -> None:
    runs = [dg.materialize([a], instance=instance).run_id for _ in range(3)]
    begin = datetime(2000, 1, 1, tzinfo=timezone.utc)
    end = datetime.now(timezone.utc) + timedelta(hours=1)
    found = storage.finished_runs(instance, begin, end, 10)
    assert [run_id for run_id, _ in found] == runs
    assert [run_id for run_id, _ in storage.finished_runs(instance, found[0][1], end, 1)] == runs[
        1:2
    ]
    assert storage.finished_runs(instance, begin, begin + timedelta(days=1), 10) == []
