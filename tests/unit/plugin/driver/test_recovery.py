"""What the log of a run says to the process that goes on with it."""

from __future__ import annotations

import itertools
from typing import Any

import dagster as dg
from dagster import DagsterEventType, EventLogEntry, EventLogRecord

from valohai_dagster.plugin.compat.engine import (
    ExecutionPlan,
    SerializableErrorInfo,
)
from valohai_dagster.plugin.driver.events import RunEvents, StepEvents
from valohai_dagster.plugin.driver.recovery import identity, past_of

ERROR = SerializableErrorInfo(message="boom", stack=[], cls_name="Failure")


def step(key: str) -> Any:
    """A step of a real plan, as snapshots give it."""

    @dg.op(name=key)
    def one() -> None: ...

    @dg.job
    def job() -> None:
        one()

    return dg_plan(job).get_step_by_key(key)


def dg_plan(job: dg.JobDefinition) -> ExecutionPlan:
    from dagster._core.execution.api import create_execution_plan

    return create_execution_plan(job)


def events(key: str = "a") -> StepEvents:
    return StepEvents("job", "run", step(key), {})


def records(*batches: list[EventLogEntry]) -> list[EventLogRecord]:
    numbers = itertools.count(1)
    return [EventLogRecord(next(numbers), entry) for batch in batches for entry in batch]


def test_a_new_run_has_no_past() -> None:
    past = past_of([])
    assert not past.started
    assert not past.begun
    assert not past.step_events


def test_a_step_whose_worker_was_looked_for_has_begun() -> None:
    one = events()
    past = past_of(records(RunEvents("job", "run").start(), one.worker_starting("queued")))
    assert past.started
    assert past.begun == {"a"}
    assert past.written["a"] == {(DagsterEventType.STEP_WORKER_STARTING,)}


def test_a_step_that_only_waited_for_a_pool_has_not_begun() -> None:
    past = past_of(records(events().pool_blocked("gpu", initial=True)))
    assert not past.begun


def test_a_finished_step_is_not_begun_and_moves_the_plan() -> None:
    one = events()
    past = past_of(records(one.start(0), one.output("result", {}), one.success(1.0)))
    assert not past.begun
    kinds = [event.event_type for event in past.step_events]
    assert kinds == [DagsterEventType.STEP_OUTPUT, DagsterEventType.STEP_SUCCESS]


def test_only_the_present_try_of_a_step_counts_as_written() -> None:
    one = events()
    past = past_of(
        records(one.start(0), one.engine("running"), one.retry(ERROR, 5.0), one.start(1))
    )
    assert past.begun == {"a"}
    assert past.written["a"] == {(DagsterEventType.STEP_START,)}
    assert "a" in past.retried_at


def test_materializations_are_told_apart_by_partition() -> None:
    one = events()
    made = [
        one.materialization(dg.AssetMaterialization(asset_key="x", partition=name))[0]
        for name in ("p", "q")
    ]
    assert len({identity(entry) for entry in made}) == 2


def test_failures_are_found_in_their_order() -> None:
    first, second = events("a"), events("b")
    past = past_of(records(first.failure(ERROR), second.failure(ERROR)))
    assert [event.step_key for event in past.failures] == ["a", "b"]
