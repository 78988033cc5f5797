"""How a failed try ends: the engine's rules for retry policies and blocking checks."""

from __future__ import annotations

import dagster as dg
import pytest
from dagster import AssetCheckEvaluation, AssetCheckSeverity, AssetKey, DagsterEventType

from tests.unit.plugin.driver.test_recovery import events
from valohai_dagster.plugin.compat.engine import DagsterEvent, ErrorSource, RetryMode
from valohai_dagster.plugin.driver.ends import (
    Retries,
    blocking_failure,
    failure_entries,
    interrupted_entries,
)
from valohai_dagster.plugin.launching import StepFailure

TWICE = dg.RetryPolicy(max_retries=2, delay=3.0, backoff=dg.Backoff.LINEAR)


def end(failure: StepFailure, policy: dg.RetryPolicy | None, before: int = 0, **values):
    retries = Retries(
        policy=policy, mode=values.get("mode", RetryMode.ENABLED), previous_attempts=before
    )
    (entry,) = failure_entries(events(), failure, retries)
    assert entry.dagster_event is not None
    return entry.dagster_event


def test_without_a_policy_a_failure_is_final() -> None:
    event = end(StepFailure(description="exit code 1"), None)
    assert event.event_type is DagsterEventType.STEP_FAILURE
    data = event.step_failure_data
    assert data.user_failure_data is not None
    assert data.user_failure_data.label == "intentional-failure"
    assert data.user_failure_data.description == "exit code 1"


@pytest.mark.parametrize(("before", "wait"), [(0, 3.0), (1, 6.0)])
def test_a_policy_asks_for_another_try_after_its_delay(before: int, wait: float) -> None:
    event = end(StepFailure(description="no"), TWICE, before)
    assert event.event_type is DagsterEventType.STEP_UP_FOR_RETRY
    assert event.step_retry_data.seconds_to_wait == wait


def test_the_last_try_names_the_limit_and_its_cause() -> None:
    data = end(StepFailure(description="no"), TWICE, 2).step_failure_data
    assert data.error is not None
    assert data.error.message == "Exceeded max_retries of 2\n"
    assert data.error.cause is not None
    assert data.error_source is ErrorSource.USER_CODE_ERROR


def test_what_was_asked_wrongly_is_not_tried_again() -> None:
    event = end(StepFailure(description="no", allow_retries=False), TWICE)
    assert event.event_type is DagsterEventType.STEP_FAILURE


def test_a_run_may_switch_retries_off() -> None:
    data = end(StepFailure(description="no"), TWICE, mode=RetryMode.DISABLED).step_failure_data
    assert data.error is not None
    assert data.error.message == "RetryRequested but retries are disabled"


def interrupted(policy: dg.RetryPolicy | None, previous_attempts: int = 0) -> DagsterEvent:
    retries = Retries(policy=policy, mode=RetryMode.ENABLED, previous_attempts=previous_attempts)
    (entry,) = interrupted_entries(events(), retries)
    assert entry.dagster_event is not None
    return entry.dagster_event


def test_an_interrupted_step_says_so() -> None:
    assert interrupted(None).step_failure_data.error_source is ErrorSource.INTERRUPT


def test_an_interrupted_step_with_tries_left_asks_for_one_as_with_the_engine() -> None:
    assert interrupted(TWICE).event_type is DagsterEventType.STEP_UP_FOR_RETRY
    assert interrupted(TWICE, 2).event_type is DagsterEventType.STEP_FAILURE


def check(*, passed: bool, blocking: bool, severity=AssetCheckSeverity.ERROR):
    return AssetCheckEvaluation(
        asset_key=AssetKey("x"),
        check_name="good",
        passed=passed,
        metadata={},
        severity=severity,
        blocking=blocking,
    )


def test_only_a_blocking_error_fails_the_step() -> None:
    assert not blocking_failure(events(), [check(passed=False, blocking=False)])
    assert not blocking_failure(events(), [check(passed=True, blocking=True)])
    warns = check(passed=False, blocking=True, severity=AssetCheckSeverity.WARN)
    assert not blocking_failure(events(), [warns])
    (entry,) = blocking_failure(events(), [check(passed=False, blocking=True)])
    assert entry.dagster_event is not None
    error = entry.dagster_event.step_failure_data.error
    assert error is not None
    assert "1 blocking asset check failed with ERROR severity:\nx: good" in error.message
