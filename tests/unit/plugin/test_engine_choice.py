"""Who drives a run is read from its snapshots."""

from __future__ import annotations

import json
from typing import Any

import dagster as dg
import pytest
from dagster._core.execution.api import create_execution_plan
from dagster._core.snap import snapshot_from_execution_plan

from valohai_dagster.plugin.compat import ExecutionPlanSnapshot, JobSnap
from valohai_dagster.plugin.engine_choice import is_ours, why_not_ours
from valohai_dagster.plugin.step_tag import DAGSTER_ENGINE, ENGINE_TAG, STEP_TAG, TAG_VERSION

TAG = {STEP_TAG: json.dumps({"v": TAG_VERSION})}


def ours(name: str, **options: Any) -> Any:
    @dg.asset(name=name, **{"op_tags": TAG, **options})
    def _asset() -> None: ...

    return _asset


@dg.asset
def plain() -> None: ...


@dg.op(tags=TAG)
def tagged() -> None: ...


def snapshots(
    job: dg.JobDefinition, steps: list[str] | None = None
) -> tuple[JobSnap, ExecutionPlanSnapshot]:
    plan = create_execution_plan(job, step_keys_to_execute=steps)
    snap = JobSnap.from_job_def(job)
    return snap, snapshot_from_execution_plan(plan, snap.snapshot_id)


def job_of(*assets: Any, **options: Any) -> dg.JobDefinition:
    job = dg.define_asset_job("job", **options)
    return dg.Definitions(assets=list(assets), jobs=[job]).resolve_job_def("job")


def answer(job: dg.JobDefinition, steps: list[str] | None = None, **run: Any) -> str | None:
    found = why_not_ours(*snapshots(job, steps), dg.DagsterRun(job_name=job.name, **run))
    assert is_ours(*snapshots(job, steps), dg.DagsterRun(job_name=job.name, **run)) == (
        found is None
    )
    return found


def test_a_run_of_our_steps_alone_is_ours():
    assert answer(job_of(ours("a"), ours("b", deps=["a"]))) is None


def test_one_foreign_step_makes_the_run_dagsters():
    assert "step plain is not a step" in str(answer(job_of(ours("a"), plain)))


def test_only_the_selected_steps_count():
    assert answer(job_of(ours("a"), plain), ["a"]) is None


def test_a_check_in_user_code_is_a_step_of_its_own():
    @dg.asset_check(asset="a")
    def check() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=True)

    job = dg.Definitions(assets=[ours("a")], asset_checks=[check])
    assert "a_check" in str(answer(job.resolve_implicit_global_asset_job_def()))


@pytest.mark.parametrize("tag", ["", "{}", "[]", "null", '{"v": 999}', "{"])
def test_a_tag_of_another_release_or_none_at_all_is_left_to_its_own_code(tag: str):
    job = job_of(ours("a", op_tags={STEP_TAG: tag}))
    assert "this release can read" in str(answer(job))


def test_a_job_may_ask_for_dagsters_engine():
    job = job_of(ours("a"), tags={ENGINE_TAG: DAGSTER_ENGINE})
    assert ENGINE_TAG in str(answer(job))


def test_a_run_may_ask_for_dagsters_engine():
    assert ENGINE_TAG in str(answer(job_of(ours("a")), tags={ENGINE_TAG: DAGSTER_ENGINE}))


def test_a_logger_of_the_users_own_needs_the_engine():
    chosen: dict[str, Any] = {"loggers": {"slack": {}}}
    assert "'slack'" in str(answer(job_of(ours("a")), run_config=chosen))
    assert answer(job_of(ours("a")), run_config={"loggers": {"console": {}}}) is None


def test_resources_need_the_engine():
    job = dg.Definitions(
        assets=[ours("a", required_resource_keys={"db"})],
        resources={"db": dg.ResourceDefinition.hardcoded_resource(1)},
    ).resolve_implicit_global_asset_job_def()
    assert answer(job) == "step a needs db"


def test_ops_inside_of_graphs_are_found():
    @dg.op(tags=TAG, required_resource_keys={"db"})
    def needy() -> None: ...

    @dg.graph
    def inner() -> None:
        tagged()

    @dg.graph
    def outer() -> None:
        inner()
        needy.alias("second")()

    job = outer.to_job(resource_defs={"db": dg.ResourceDefinition.none_resource()})
    assert answer(job, ["inner.tagged"]) is None
    assert answer(job) == "step second needs db"


def test_dynamic_steps_need_the_engine():
    @dg.op(tags=TAG, out=dg.DynamicOut())
    def many() -> Any:
        yield dg.DynamicOutput(1, "x")

    @dg.op(tags=TAG)
    def each(value: Any) -> None: ...

    @dg.job
    def job() -> None:
        many().map(each)

    assert answer(job, ["many"]) == "step many is dynamic"
    assert "is dynamic" in str(answer(job))
