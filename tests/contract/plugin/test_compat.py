"""One test per private Dagster fact that `plugin/compat.py` stands on; an upgrade that breaks one fails here."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import AssetExecutionContext, AssetKey, DagsterEventType, DagsterInstance

import valohai_dagster
from valohai_dagster.plugin import compat


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with dg.instance_for_test() as found:
        yield found


def run_with(function: Any, instance: DagsterInstance, **options: Any) -> Any:
    @dg.asset(key=["p", "child"], deps=[["p", "parent"]], **options)
    def child(context):
        return function(context)

    @dg.asset(key=["p", "parent"])
    def parent():
        return dg.MaterializeResult(data_version=dg.DataVersion("v1"))

    assets: Any = [parent, child]
    return dg.materialize(assets, instance=instance)


def test_private_imports_stand_in_compat_alone() -> None:
    root = Path(valohai_dagster.__file__).parent
    pattern = re.compile(r"^\s*(from|import) dagster(\._|_shared)", re.MULTILINE)
    found = [str(p.relative_to(root)) for p in root.rglob("*.py") if pattern.search(p.read_text())]
    assert {name.rpartition("/")[0] for name in found} == {"plugin/compat"}


def test_callers_that_meet_a_new_storage_at_once_agree_on_its_id(postgres_url: str) -> None:
    """Dagster looks for the id and then makes it, without a lock; a run handed over under the other id is lost."""
    overrides = {"storage": {"postgres": {"postgres_url": postgres_url}}}
    with dg.instance_for_test(overrides=overrides) as instance:
        assert instance.run_storage
        barrier = threading.Barrier(6)

        def ask(_: int) -> str:
            barrier.wait(10)
            return compat.instance_id(instance)

        with ThreadPoolExecutor(6) as pool:
            assert len({*pool.map(ask, range(6)), compat.instance_id(instance)}) == 1


def test_step_key_and_instance_id(instance: DagsterInstance) -> None:
    seen: list[Any] = []
    run_with(
        lambda c: seen.append((compat.step_key_of(c), compat.instance_id(c.instance))), instance
    )
    assert seen[0][0] == "p__child"
    assert seen[0][1] == compat.instance_id(instance) != ""


def test_engine_events_are_written_at_once(instance: DagsterInstance) -> None:
    def tell(context: AssetExecutionContext) -> None:
        compat.report_engine_event(
            instance, context.run, "hop", step_key="p__child", metadata={"a": "b"}
        )
        records = instance.get_records_for_run(
            context.run.run_id, of_type=DagsterEventType.ENGINE_EVENT
        ).records
        assert records[-1].event_log_entry.message == "hop"

    assert run_with(tell, instance).success


def test_observations_are_written_at_once(instance: DagsterInstance) -> None:
    key = AssetKey(["p", "child"])

    def tell(context: AssetExecutionContext) -> None:
        compat.observe(context, dg.AssetObservation(asset_key=key, metadata={"x": 1.0}))
        assert len(instance.fetch_observations(key, limit=5).records) == 1

    assert run_with(tell, instance).success


DAYS = dg.StaticPartitionsDefinition(["a", "b", "c"])


def run_partitioned(function: Any, instance: DagsterInstance) -> None:
    """`function` in a step without partitions, below an asset whose partitions a and b were made."""

    @dg.asset(key=["p", "parent"], partitions_def=DAYS)
    def parent(context):
        version = dg.DataVersion(f"v{context.partition_key}{len(instance.get_runs())}")
        return dg.MaterializeResult(data_version=version)

    @dg.asset(key=["p", "child"], deps=[parent])
    def child(context):
        function(context)

    for key in ("a", "b"):
        dg.materialize([parent], instance=instance, partition_key=key)
    assert dg.materialize([parent, child], instance=instance, selection=[child]).success


def test_the_partitions_that_a_step_depends_on(instance: DagsterInstance) -> None:
    seen: list[Any] = []
    parent = AssetKey(["p", "parent"])
    run_partitioned(lambda c: seen.append(compat.input_partition_keys(c, parent)), instance)
    run_with(lambda c: seen.append(compat.input_partition_keys(c, parent)), instance)
    assert seen == [["a", "b", "c"], None]


def test_pinned_partitions_get_the_version_that_the_engine_gives_them(
    instance: DagsterInstance,
) -> None:
    parent, child = AssetKey(["p", "parent"]), AssetKey(["p", "child"])

    def pin(context: AssetExecutionContext) -> None:
        step = context.op_execution_context.get_step_execution_context()
        engine = step.maybe_fetch_and_get_input_asset_version_info(parent)
        records = instance.fetch_materializations(parent, limit=5).records
        compat.pin_input(context, parent, records, partitioned=True)
        assert step.maybe_fetch_and_get_input_asset_version_info(parent) == engine

    run_partitioned(pin, instance)
    assert instance.get_latest_materialization_event(child) is not None


def test_a_code_server_is_told_from_the_processes_of_runs() -> None:
    from dagster._core.definitions.definitions_load_context import (
        DefinitionsLoadContext,
        DefinitionsLoadType,
    )

    seen: list[bool] = [compat.is_first_load()]
    for kind in (DefinitionsLoadType.INITIALIZATION, DefinitionsLoadType.RECONSTRUCTION):
        DefinitionsLoadContext.set(DefinitionsLoadContext(kind))
        seen.append(compat.is_first_load())
    DefinitionsLoadContext._instance = None
    assert seen == [False, True, False]


def test_the_engine_records_the_pinned_input(instance: DagsterInstance) -> None:
    parent = AssetKey(["p", "parent"])
    instance.report_runless_asset_event(
        dg.AssetMaterialization(parent, tags={compat.DATA_VERSION_TAG: "old"})
    )
    old = instance.fetch_materializations(parent, limit=1).records[0]

    def pin(context: AssetExecutionContext) -> None:
        assert compat.input_storage_id(context, parent) != old.storage_id
        compat.pin_input(context, parent, [old])
        assert compat.input_storage_id(context, parent) == old.storage_id

    run_with(pin, instance, code_version="1")
    found = instance.get_latest_materialization_event(AssetKey(["p", "child"]))
    assert found is not None
    assert found.asset_materialization is not None
    tags = found.asset_materialization.tags or {}
    assert tags[compat.get_input_data_version_tag(parent)] == "old"
    assert tags[compat.CODE_VERSION_TAG] == "1"


def test_a_materializations_tags_may_name_the_code_version_that_ran(
    instance: DagsterInstance,
) -> None:
    @dg.asset(code_version="loaded")
    def thing():
        return dg.MaterializeResult(tags={compat.CODE_VERSION_TAG: "ran"})

    assert dg.materialize([thing], instance=instance).success
    found = instance.get_latest_materialization_event(AssetKey("thing"))
    assert found is not None
    assert found.asset_materialization is not None
    assert (found.asset_materialization.tags or {})[compat.CODE_VERSION_TAG] == "ran"


def test_tagged_ops_are_found_in_the_snapshot(instance: DagsterInstance) -> None:
    result = run_with(lambda context: None, instance, op_tags={"valohai/step": "{}"})
    run = instance.get_run_by_id(result.run_id)
    assert compat.tagged_ops(instance, run, "valohai/step") == {"p__child"}
    assert compat.tagged_ops(instance, None, "valohai/step") == frozenset()


def test_log_keys_are_built_as_dagster_builds_them(instance: DagsterInstance) -> None:
    manager = instance.compute_log_manager
    assert list(manager.build_log_key_for_run("run", "abc")) == list(
        compat.log_key_of_event("run", "abc")
    )


def test_code_references_come_without_a_warning() -> None:
    value = compat.code_reference("/x/valohai.yaml", 3)
    assert value.value is not None


def test_outside_code_locations_nothing_is_pinned() -> None:
    compat.pin_code_location("valohai/x", "1")
    assert compat.code_location_pin("valohai/x") is None


def test_a_run_process_gets_the_pin_of_the_code_server() -> None:
    from dagster._core.definitions.definitions_load_context import (
        DefinitionsLoadContext,
        DefinitionsLoadType,
    )
    from dagster._core.definitions.repository_definition import RepositoryLoadData

    first = DefinitionsLoadContext(load_type=DefinitionsLoadType.INITIALIZATION)
    with DefinitionsLoadContext.scoped(first):
        compat.pin_code_location("valohai/x", "abc")
        assert compat.code_location_pin("valohai/x") is None
    from dagster._core.definitions.metadata.metadata_value import (
        CodeLocationReconstructionMetadataValue,
    )

    data = RepositoryLoadData(
        cacheable_asset_data={},
        reconstruction_metadata={
            k: CodeLocationReconstructionMetadataValue(v)
            for k, v in first.get_pending_reconstruction_metadata().items()
        },
    )
    second = DefinitionsLoadContext(
        load_type=DefinitionsLoadType.RECONSTRUCTION, repository_load_data=data
    )
    with DefinitionsLoadContext.scoped(second):
        assert compat.code_location_pin("valohai/x") == "abc"
        assert compat.code_location_pin("valohai/other") is None


def test_the_webserver_lets_our_log_manager_serve_downloads() -> None:
    """Its download endpoint asks for `LocalComputeLogManager` and calls `get_captured_local_path`."""
    from valohai_dagster import ValohaiComputeLogManager

    assert issubclass(ValohaiComputeLogManager, compat.LocalComputeLogManager)
    assert hasattr(compat.LocalComputeLogManager, "get_captured_local_path")


def test_the_reader_of_a_finished_view_gets_one_more_empty_chunk(instance: DagsterInstance) -> None:
    subscription = compat.CapturedLogSubscription(instance.compute_log_manager, ["a", "b"], "1:2")
    seen: list[Any] = []
    subscription(seen.append)
    seen.clear()
    compat.finish_subscription(subscription)
    assert subscription.is_complete
    assert [(data.stdout, data.cursor) for data in seen] == [(None, subscription._cursor)]


# -- the run coordinator ----------------------------------------------------------------------------------------


def test_plan_snapshots_show_what_the_choice_of_the_engine_reads(instance: DagsterInstance) -> None:
    result = run_with(lambda context: None, instance, op_tags={"valohai/step": "{}"})
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    plan = instance.get_execution_plan_snapshot(str(run.execution_plan_snapshot_id))
    assert isinstance(plan, compat.ExecutionPlanSnapshot)
    (step,) = [step for step in plan.steps if step.key == "p__child"]
    assert "valohai/step" in (step.tags or {})
    assert (step.kind.value, step.node_handle_id) == ("COMPUTE", "p__child")
    assert [output.properties and output.properties.is_dynamic for output in step.outputs] == [
        False
    ]
    job = instance.get_job_snapshot(str(run.job_snapshot_id))
    assert isinstance(job, compat.JobSnap)
    assert [list(op.required_resource_keys) for op in job.node_defs_snapshot.op_def_snaps] == [
        [],
        [],
    ]


def test_the_instance_resolves_the_limits_of_its_queue() -> None:
    overrides: dict[str, Any] = {
        "run_coordinator": {
            "module": "dagster._core.run_coordinator",
            "class": "QueuedRunCoordinator",
            "config": {"max_user_code_failure_retries": 2},
        },
        "concurrency": {
            "runs": {
                "max_concurrent_runs": 7,
                "tag_concurrency_limits": [{"key": "a", "limit": 1}],
            },
            "pools": {"granularity": "run"},
        },
    }
    with dg.instance_for_test(overrides=overrides) as limited:
        config = limited.get_concurrency_config()
    assert isinstance(config, compat.ConcurrencyConfig)
    assert config.pool_config.pool_granularity is not None
    assert config.pool_config.pool_granularity.value == "run"
    queue = config.run_queue_config
    assert isinstance(queue, compat.RunQueueConfig)
    assert queue.max_concurrent_runs == 7
    assert queue.tag_concurrency_limits == [{"key": "a", "limit": 1}]
    assert queue.max_user_code_failure_retries == 2
    assert queue.should_block_op_concurrency_limited_runs


def test_a_run_knows_the_pools_of_its_steps(instance: DagsterInstance) -> None:
    result = run_with(lambda context: None, instance, pool="gpu")
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert isinstance(run.run_op_concurrency, compat.RunOpConcurrency)
    assert run.run_op_concurrency.all_pools == {"gpu"}
    assert run.run_op_concurrency.has_unconstrained_root_nodes  # the parent has no pool


def test_a_submitted_run_comes_with_its_workspace() -> None:
    assert compat.SubmitRunContext._fields == ("dagster_run", "workspace")


@pytest.mark.parametrize("with_record", [True, False])
def test_the_engine_records_a_pinned_version(instance: DagsterInstance, with_record: bool) -> None:
    """Of an observation that is older than the newest one, or of none at all."""
    key = AssetKey(["p", "parent"])
    tags = {compat.DATA_VERSION_TAG: "seen", compat.DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
    with compat.disable_dagster_warnings():
        observation = dg.AssetObservation(key, tags=tags)
    instance.report_runless_asset_event(observation)
    record = instance.fetch_observations(key, limit=1).records[0]

    def pin(context: AssetExecutionContext) -> None:
        compat.pin_version(context, key, "used", record if with_record else None)

    run_with(pin, instance)
    found = instance.get_latest_materialization_event(AssetKey(["p", "child"]))
    assert found is not None
    assert found.asset_materialization is not None
    made = found.asset_materialization.tags or {}
    assert made[compat.get_input_data_version_tag(key)] == "used"
    pointer = str(record.storage_id) if with_record else "NULL"
    assert made[f"dagster/input_event_pointer/{key.to_user_string()}"] == pointer
