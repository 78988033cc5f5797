"""The plan of a run: limits from its config, and the way back into a plan that was half done."""

from __future__ import annotations

import dagster as dg
import pytest

from tests.unit.plugin.driver.test_recovery import ERROR, dg_plan, records
from valohai_dagster.plugin.compat.engine import (
    RetryMode,
)
from valohai_dagster.plugin.driver.events import StepEvents
from valohai_dagster.plugin.driver.facts import JobFacts
from valohai_dagster.plugin.driver.plan import Limits, Plan, limits_of
from valohai_dagster.plugin.driver.recovery import past_of


@dg.op
def one(): ...


@dg.op(ins={"before": dg.In(dg.Nothing)})
def two(): ...


@dg.op(ins={"before": dg.In(dg.Nothing)})
def three(): ...


@dg.job
def chain():
    first = one()
    three(two(first))


@dg.job
def wide():
    one()
    one.alias("other")()


def facts(job: dg.JobDefinition) -> JobFacts:
    return JobFacts(job=None, plan=dg_plan(job), steps={})  # pyright: ignore[reportArgumentType]


def events(plan: JobFacts, key: str) -> StepEvents:
    return StepEvents("job", "run", plan.plan.get_step_by_key(key), {})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        ({}, Limits()),
        ({"execution": {"config": {"in_process": {}}}}, Limits(max_concurrent=1)),
        (
            {"execution": {"config": {"multiprocess": {"max_concurrent": 3}}}},
            Limits(max_concurrent=3),
        ),
        ({"execution": {"config": {"max_concurrent": 0}}}, Limits()),
        (
            {"execution": {"config": {"multiprocess": {"retries": {"disabled": {}}}}}},
            Limits(retries=RetryMode.DISABLED),
        ),
    ],
)
def test_limits_come_from_the_run_config(config: dict, limits: Limits) -> None:
    assert limits_of(config) == limits


def test_a_new_plan_begins_with_its_first_steps() -> None:
    plan = Plan(facts(chain), Limits())
    assert [step.key for step in plan.next_steps()] == ["one"]
    assert not plan.complete


def test_a_limit_of_steps_holds_after_a_take_over_too() -> None:
    source = facts(wide)
    plan = Plan(source, Limits(max_concurrent=1))
    past = past_of(records(events(source, "other").worker_starting("queued")))
    assert [step.key for step in plan.resume(past)] == ["other"]
    plan.limit(None, None, pools=False)  # pyright: ignore[reportArgumentType]
    assert plan.next_steps() == []


def test_a_plan_goes_on_behind_what_the_log_says() -> None:
    source = facts(chain)
    done, now = events(source, "one"), events(source, "two")
    past = past_of(
        records(done.start(0), done.output("result", {}), done.success(1.0), now.start(0))
    )
    plan = Plan(source, Limits())
    assert [step.key for step in plan.resume(past)] == ["two"]
    assert plan.next_steps() == []


def test_a_retry_waits_from_the_moment_it_was_asked_for() -> None:
    source = facts(chain)
    first = events(source, "one")
    entries = [*first.start(0), *first.retry(ERROR, 1_000.0)]
    past = past_of(records(entries))
    past.retried_at["one"] -= 990.0  # it was long ago
    plan = Plan(source, Limits())
    plan.resume(past)
    wait = plan.seconds_to_retry()
    assert wait is not None
    assert wait < 20.0
    assert plan.previous_attempts("one") == 1


def test_a_failed_step_leaves_those_behind_it_out() -> None:
    source = facts(chain)
    past = past_of(records(events(source, "one").start(0), events(source, "one").failure(ERROR)))
    plan = Plan(source, Limits())
    plan.resume(past)
    assert [(step.key, failed) for step, failed, _ in plan.abandons()] == [("two", ["one"])]
    assert [(step.key, before) for step, _, before in plan.abandons()] == [("three", ["two"])]
    assert plan.complete
