"""What an attempt counts as, and in which words."""

from __future__ import annotations

import pytest

from valohai_agent.protocol import Outcome
from valohai_agent.runtimes.base import ExitStatus
from valohai_agent.stopping import Cause, Limits
from valohai_agent.verdict import Observed, judge

LIMITS = Limits(time_limit_seconds=5400, no_output_timeout_seconds=60)


def test_c20_exit_code_zero_is_complete() -> None:
    verdict = judge(Observed(exit=ExitStatus(code=0)))
    assert (verdict.outcome, verdict.reason, verdict.exit_code) == (Outcome.complete, None, 0)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (ExitStatus(code=3), "exit code 3"),
        (ExitStatus(code=127), "command not found"),
        (ExitStatus(code=126), "cannot be executed"),
        (ExitStatus(code=139), "SIGSEGV"),
        (ExitStatus(code=255), "exit code 255"),
        (ExitStatus(code=137, oom_killed=True), "memory ran out"),
        (ExitStatus(code=137, message="killed by the kernel"), "killed by the kernel"),
    ],
)
def test_c29_other_codes_are_errors_with_an_explanation(status: ExitStatus, words: str) -> None:
    verdict = judge(Observed(exit=status))
    assert verdict.outcome is Outcome.error
    assert words in (verdict.reason or "")
    assert verdict.exit_code == status.code


def test_a_command_that_never_began_has_no_exit_code_in_its_reason() -> None:
    status = ExitStatus(code=125, started=False, message="its directories could not be made")
    assert judge(Observed(exit=status)).reason == "its directories could not be made"


def test_l03_a_command_that_ended_well_while_being_stopped_counts_as_stopped() -> None:
    verdict = judge(Observed(exit=ExitStatus(code=0), stop_requested=True))
    assert verdict.outcome is Outcome.stopped


def test_a_stop_before_the_command_began_is_stopped_without_exit_code() -> None:
    verdict = judge(Observed(cause=Cause.user, stop_requested=True, stop_reason="not needed"))
    assert (verdict.outcome, verdict.reason, verdict.exit_code) == (
        Outcome.stopped,
        "not needed",
        None,
    )


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (Cause.time_limit, "Time limit of 1 h 30 min exceeded"),
        (Cause.silence, "No output for 1 min"),
    ],
)
def test_m30_m31_a_reached_limit_is_an_error_whatever_the_exit_code(
    cause: Cause, words: str
) -> None:
    verdict = judge(Observed(exit=ExitStatus(code=0), cause=cause, limits=LIMITS))
    assert verdict.outcome is Outcome.error
    assert words in (verdict.reason or "")


def test_an_agent_that_had_to_leave_is_an_error_that_says_so() -> None:
    verdict = judge(Observed(exit=ExitStatus(code=130), cause=Cause.shutdown))
    assert verdict.outcome is Outcome.error
    assert "shut down" in (verdict.reason or "")


def test_o18_an_output_that_cannot_be_stored_turns_complete_into_error() -> None:
    verdict = judge(Observed(exit=ExitStatus(code=0), output_problems=["model.pkl: store is full"]))
    assert verdict.outcome is Outcome.error
    assert "store is full" in (verdict.reason or "")


def test_many_problems_are_counted_not_listed() -> None:
    verdict = judge(Observed(output_problems=[f"file {n}" for n in range(20)]))
    assert "file 4" in (verdict.reason or "")
    assert "15 more" in (verdict.reason or "")
