"""Decisions about reports, stops, ends and losses (CONTRACT 8.1; the loss table of the protocol)."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from valohai_agent.protocol import Outcome
from valohai_dagster.executions.lifecycle import (
    MAX_RESTARTS,
    PARTITION_GRACE,
    AfterReclaim,
    Loss,
    LossStep,
    Standing,
    Verdict,
    after_reclaim,
    judge_loss,
    judge_report,
    status_after_finish,
    status_after_lease,
    status_after_stop,
)
from valohai_dagster.executions.stream import ExecutionStatus as Status

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
LEASED = Standing(status=Status.started, attempt=2, token="t2", last_seq=5)
QUEUED = Standing(status=Status.queued, attempt=2, token=None, last_seq=0)


def judge(
    standing: Standing,
    *,
    attempt: int = 2,
    token: str = "t2",
    seq: int = 6,
    lease: str | None = None,
) -> Verdict:
    return judge_report(standing, attempt=attempt, token=token, seq=seq, lease_token=lease)


def test_the_next_report_under_the_current_token_applies():
    assert judge(LEASED) is Verdict.apply


def test_a_report_that_was_applied_before_is_only_replayed():
    assert judge(LEASED, seq=5) is Verdict.replay


def test_a_report_of_an_earlier_attempt_is_fenced():
    assert judge(LEASED, attempt=1, token="t1") is Verdict.fence


def test_a_report_under_another_token_is_fenced():
    assert judge(LEASED, token="stolen") is Verdict.fence


def test_the_first_report_binds_its_token_when_the_lease_agrees():
    assert judge(QUEUED, seq=1, lease="t2") is Verdict.apply


def test_the_first_report_binds_its_token_when_the_lease_has_expired_meanwhile():
    assert judge(QUEUED, seq=1, lease=None) is Verdict.apply


def test_a_first_report_that_contradicts_the_lease_is_fenced():
    assert judge(QUEUED, seq=1, token="forged", lease="t2") is Verdict.fence


def test_nothing_applies_to_an_ended_execution_but_its_last_report_is_replayed():
    ended = replace(LEASED, status=Status.complete)
    assert judge(ended, seq=6) is Verdict.fence
    assert judge(ended, seq=5) is Verdict.replay


def test_a_report_from_the_future_is_dropped():
    assert judge(LEASED, attempt=3) is Verdict.drop


@pytest.mark.parametrize(
    ("status", "hard", "expected"),
    [
        (Status.started, False, Status.stopping),
        (Status.started, True, Status.stopping_hard),
        (Status.stopping, True, Status.stopping_hard),
        (Status.stopping_hard, False, Status.stopping_hard),
        (Status.complete, True, Status.complete),
    ],
)
def test_l02_transitions_of_a_stop(status: Status, hard: bool, expected: Status):
    assert status_after_stop(status, hard=hard) is expected


def test_l02_a_lease_starts_what_waits_and_leaves_a_requested_stop_alone():
    assert status_after_lease(Status.queued) is Status.started
    assert status_after_lease(Status.stopping) is Status.stopping


def test_l03_what_ends_while_stopping_is_stopped_however_it_ended():
    assert status_after_finish(Outcome.complete, stop_requested=True) is Status.stopped
    assert status_after_finish(Outcome.error, stop_requested=True) is Status.stopped


def test_an_end_without_a_stop_is_what_the_agent_says():
    assert status_after_finish(Outcome.complete, stop_requested=False) is Status.complete
    assert status_after_finish(Outcome.error, stop_requested=False) is Status.error


def loss(**changes: object) -> Loss:
    base = Loss(suspected_at=None, death_confirmed=False, stop_requested=False, attempt=1)
    return replace(base, **changes)


def test_a_silent_worker_is_first_only_suspected():
    assert judge_loss(loss(), NOW) is LossStep.suspect


def test_a_suspected_worker_keeps_its_execution_during_the_grace():
    almost = NOW + PARTITION_GRACE - timedelta(seconds=1)
    assert judge_loss(loss(suspected_at=NOW), almost) is LossStep.wait


def test_after_the_grace_another_attempt_starts():
    assert judge_loss(loss(suspected_at=NOW), NOW + PARTITION_GRACE) is LossStep.requeue


def test_a_confirmed_death_starts_another_attempt_at_once():
    assert judge_loss(loss(death_confirmed=True), NOW) is LossStep.requeue


def test_infrastructure_attempts_are_bounded():
    assert judge_loss(loss(death_confirmed=True, attempt=3), NOW) is LossStep.give_up


def test_a_stopped_execution_is_not_started_again():
    assert judge_loss(loss(death_confirmed=True, stop_requested=True), NOW) is LossStep.stopped


def test_a_machine_that_is_silent_after_its_reclaim_was_due_is_gone():
    announced = loss(reclaimed_at=NOW)
    assert judge_loss(announced, NOW - timedelta(seconds=1)) is LossStep.suspect
    assert judge_loss(announced, NOW) is LossStep.reclaimed
    assert judge_loss(replace(announced, attempt=3), NOW) is LossStep.reclaimed
    assert judge_loss(replace(announced, stop_requested=True), NOW) is LossStep.stopped


def test_a_machine_that_is_cut_off_long_before_its_reclaim_is_due_is_lost_as_any_other():
    announced = loss(reclaimed_at=NOW + timedelta(days=1), suspected_at=NOW)
    assert judge_loss(announced, NOW + PARTITION_GRACE) is LossStep.requeue
    assert judge_loss(replace(announced, death_confirmed=True), NOW) is LossStep.reclaimed


def follows(**changes: object) -> AfterReclaim:
    facts = {"began": True, "autorestart": True, "restarts": 0, "attempt": 1, **changes}
    return after_reclaim(**facts)


def test_l31_autorestart_is_asked_for():
    assert follows() is AfterReclaim.restart
    assert follows(autorestart=False) is AfterReclaim.end


def test_l32_at_most_ten_restarts_whatever_the_attempts_are():
    assert MAX_RESTARTS == 10
    assert follows(restarts=9, attempt=3) is AfterReclaim.restart
    assert follows(restarts=10) is AfterReclaim.end


def test_a_command_that_had_not_begun_needs_no_restart():
    assert follows(began=False, autorestart=False) is AfterReclaim.again
    assert follows(began=False, attempt=3) is AfterReclaim.restart
    assert follows(began=False, attempt=3, autorestart=False) is AfterReclaim.end
