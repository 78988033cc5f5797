"""Checks and hooks of steps on a real DagsterInstance, with a backend that plays the platform."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
from dagster import AssetKey, DagsterEventType, DagsterInstance

from tests.support.dagster_face import TWO_STEPS, FakeBackend, project_of
from valohai_dagster import MetricCheck, valohai_job
from valohai_dagster.plugin.assets import project_assets
from valohai_dagster.plugin.step_tag import ENGINE_TAG, STEP_TAG, read_step_tag

PREP = AssetKey(["digits", "Prepare_data"])


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with dg.instance_for_test() as found:
        yield found


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(metadata={"rows_kept": 90})


def run(
    instance: DagsterInstance, backend: FakeBackend, *checks: MetricCheck
) -> dg.ExecuteInProcessResult:
    assets = project_assets(
        project_of(TWO_STEPS), open_backend=lambda: backend, checks={"Prepare data": list(checks)}
    )
    return dg.materialize(assets, instance=instance, raise_on_error=False)


def check(condition: str, **values: Any) -> MetricCheck:
    return MetricCheck(**{"name": "enough", "condition": condition, **values})


def events(instance: DagsterInstance, run_id: str, kind: DagsterEventType) -> list[Any]:
    records = instance.get_records_for_run(run_id, of_type=kind).records
    return [record.event_log_entry.dagster_event for record in records]


def test_a_check_that_holds_is_in_the_event_log_with_its_values(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    result = run(instance, backend, check("rows_kept >= 90", blocking=True))
    assert result.success
    (found,) = result.get_asset_check_evaluations()
    assert (found.check_name, found.passed, found.blocking) == ("enough", True, True)
    assert found.metadata["value/rows_kept"].value == 90
    assert found.target_materialization_data is not None


def test_a_blocking_check_fails_the_step_after_its_outputs(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    result = run(instance, backend, check("rows_kept > 90", blocking=True))
    assert not result.success
    assert instance.get_latest_materialization_event(PREP) is not None
    assert [spec.step for spec in backend.submitted] == ["Prepare data"]
    failure = events(instance, result.run_id, DagsterEventType.STEP_FAILURE)[0]
    assert "1 blocking asset check failed with ERROR severity" in str(
        failure.step_failure_data.error
    )


def test_a_retry_policy_does_not_repeat_what_a_check_has_failed(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    assets = project_assets(
        project_of(TWO_STEPS),
        open_backend=lambda: backend,
        checks={"Prepare data": [check("rows_kept > 90", blocking=True)]},
        retry_policy=dg.RetryPolicy(max_retries=2),
    )
    assert not dg.materialize(assets, instance=instance, raise_on_error=False).success
    assert len(backend.submitted) == 1


@pytest.mark.parametrize("options", [{}, {"blocking": True, "severity": "WARN"}])
def test_other_failed_checks_are_told_and_stop_nothing(
    instance: DagsterInstance, backend: FakeBackend, options: dict[str, Any]
) -> None:
    result = run(instance, backend, check("rows_kept > 90", **options))
    assert result.success
    assert not result.get_asset_check_evaluations()[0].passed


def test_an_unknown_metric_fails_its_check_alone(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    result = run(
        instance,
        backend,
        check("rows > 90"),
        check("kept > 1", name="b"),
        check("rows == 100", name="c"),
    )
    assert result.success
    found = {one.check_name: one for one in result.get_asset_check_evaluations()}
    assert [found[name].passed for name in ("enough", "b", "c")] == [True, False, True]
    assert "the execution reported no `kept`" in (found["b"].description or "")


# -- hooks ---------------------------------------------------------------------------------------------------------


@dg.success_hook
def tell(context: dg.HookContext) -> None:
    FIRED.append(context.op.name)


FIRED: list[str] = []


def jobs_of(backend: FakeBackend, *jobs: Any) -> dg.Definitions:
    assets = project_assets(project_of(TWO_STEPS), open_backend=lambda: backend)
    return dg.Definitions(assets=assets, jobs=jobs)


def test_hooks_of_a_job_fire_and_dagsters_engine_is_asked_for(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    FIRED.clear()
    defs = jobs_of(backend, valohai_job("hooked", "*", hooks={tell}, tags={"team": "ml"}))
    job = defs.resolve_job_def("hooked")
    assert job.get_job_snapshot().tags[ENGINE_TAG] == "dagster"
    result = job.execute_in_process(instance=instance)
    stored = instance.get_run_by_id(result.run_id)
    assert stored is not None
    assert (stored.tags[ENGINE_TAG], stored.tags["team"]) == ("dagster", "ml")
    assert sorted(FIRED) == ["digits__Prepare_data", "digits__train"]


def test_run_tags_of_ones_own_keep_the_mark(backend: FakeBackend) -> None:
    given = {"run_tags": {"a": "b"}, "op_retry_policy": dg.RetryPolicy(max_retries=1)}
    job = jobs_of(backend, valohai_job("retried", "*", **given)).resolve_job_def("retried")
    assert job.run_tags == {"a": "b", ENGINE_TAG: "dagster"}


def test_a_job_without_hooks_is_left_to_the_conductor(backend: FakeBackend) -> None:
    job = jobs_of(backend, valohai_job("plain", "*")).resolve_job_def("plain")
    assert ENGINE_TAG not in job.get_job_snapshot().tags


def test_checks_retries_and_pool_are_in_the_jobs_snapshot(backend: FakeBackend) -> None:
    given = check("rows_kept > 1", blocking=True)
    policy = dg.RetryPolicy(max_retries=2, delay=3, backoff=dg.Backoff.LINEAR)
    assets = project_assets(
        project_of(TWO_STEPS),
        checks={"train": [given]},
        retry_policy={"train": policy},
        pool={"train": "gpu"},
    )
    job = dg.Definitions(assets=assets).resolve_implicit_global_asset_job_def()
    ops = {op.name: op for op in job.get_job_snapshot().node_defs_snapshot.op_def_snaps}
    tag = read_step_tag(ops["digits__train"].tags[STEP_TAG])
    assert tag.checks == (given,)
    assert tag.retry is not None
    assert tag.retry.policy() == policy
    assert ops["digits__train"].pool == "gpu"
