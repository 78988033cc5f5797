"""What the run driver stands on in Dagster's engine; an upgrade that moves one of these fails here, by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterInstance

from valohai_dagster.plugin.compat import engine, instance_id


@dg.op
def one(): ...


@dg.op(ins={"before": dg.In(dg.Nothing)})
def two(): ...


@dg.job
def chain():
    two(one())


def plan() -> engine.ExecutionPlan:
    from dagster._core.execution.api import create_execution_plan

    return create_execution_plan(chain)


def active() -> engine.ActiveExecution:
    return engine.ActiveExecution(plan(), engine.RetryMode.ENABLED)


@pytest.mark.parametrize(
    "name",
    [
        "_in_flight", "_executable", "_waiting_to_retry", "_skipped_deps", "_failed", "_abandoned",
        "_max_concurrent", "_tag_concurrency_limits", "_instance_concurrency_context",
    ],
)  # fmt: skip
def test_the_state_machine_keeps_its_state_where_the_driver_looks(name: str) -> None:
    assert hasattr(active(), name)


def test_a_plan_comes_back_from_its_snapshot() -> None:
    with dg.instance_for_test() as instance:
        run = instance.create_run_for_job(chain)
        assert run.execution_plan_snapshot_id
        snapshot = instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id)
        found = engine.ExecutionPlan.rebuild_from_snapshot(run.job_name, snapshot)
        assert found.step_keys_to_execute == ["one", "two"]


def test_steps_that_had_not_begun_go_back() -> None:
    state = active()
    state.__enter__()  # left without the exit, which wants the plan completed
    assert [step.key for step in state.get_steps_to_execute()] == ["one"]
    assert engine.put_back(state, keep=()) == []
    assert [step.key for step in state.get_steps_to_execute()] == ["one"]
    assert [step.key for step in engine.put_back(state, keep={"one"})] == ["one"]


def test_claims_that_wait_can_be_asked_at_once() -> None:
    with dg.instance_for_test() as instance:
        run = instance.create_run_for_job(chain)
        instance.event_log_storage.set_concurrency_slots("gpu", 1)
        instance.event_log_storage.claim_concurrency_slot("gpu", "other", "step")
        with engine.InstanceConcurrencyContext(instance, run) as context:
            assert not context.claim("gpu", "one")
            assert context.pending_claim_steps() == ["one"]
            instance.event_log_storage.free_concurrency_slot_for_step("other", "step")
            context._pending_timeouts["one"] = 0.0
            assert context.claim("gpu", "one")
            # A conductor that takes over claims what its predecessor holds.
            again = engine.InstanceConcurrencyContext(instance, run)
            assert again.claim("gpu", "one")
        info = instance.event_log_storage.get_concurrency_info("gpu")
        assert info.active_slot_count == 1


def test_input_versions_are_read_without_a_step_context() -> None:
    @dg.asset
    def parent():
        return dg.MaterializeResult(data_version=dg.DataVersion("v1"))

    with dg.instance_for_test() as instance:
        assert dg.materialize([parent], instance=instance).success
        layer = SimpleNamespace(get_node_input_name=lambda handle, key: None)
        context: Any = SimpleNamespace(
            instance=instance,
            node_handle=None,
            job_def=SimpleNamespace(asset_layer=layer),
            has_asset_partitions_for_input=lambda name: False,
        )
        cache = engine.DataVersionCache(context)
        cache._fetch_input_asset_version_info([parent.key])
        info = cache.input_asset_version_info[parent.key]
        assert info is not None
        assert info.data_version == dg.DataVersion("v1")


def test_provenance_tags_are_the_engines() -> None:
    key = dg.AssetKey(["a", "b"])
    inputs = {key: {"data_version": dg.DataVersion("v1"), "storage_id": 7}}
    tags = engine.data_version_tags(dg.DataVersion("v2"), "code", inputs)
    assert tags == {
        "dagster/code_version": "code",
        "dagster/data_version": "v2",
        "dagster/data_version_is_user_provided": "true",
        "dagster/input_data_version/a/b": "v1",
        "dagster/input_event_pointer/a/b": "7",
    }


def test_an_instance_is_opened_again_from_its_description() -> None:
    with dg.instance_for_test() as instance:
        described = instance.get_ref().to_dict()
        with DagsterInstance.from_ref(engine.InstanceRef.from_dict(described)) as found:
            assert instance_id(found) == instance_id(instance)


def test_an_error_is_kept_with_its_class() -> None:
    try:
        raise ValueError("boom")
    except ValueError as error:
        kept = engine.serializable_error(error)
    assert kept.cls_name == "ValueError"
    assert "boom" in kept.message
