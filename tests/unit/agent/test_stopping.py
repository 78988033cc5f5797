"""Which signal is due when (K-54), and which limit is reached (M-30, M-31)."""

from __future__ import annotations

import pytest

from valohai_agent.stopping import Cause, Limits, Patience, StopSequence, format_duration


def signals_until(sequence: StopSequence, end: int) -> list[tuple[int, str]]:
    sent = []
    for second in range(end + 1):
        while (name := sequence.due(second)) is not None:
            sent.append((second, name))
    return sent


def test_k54_soft_stop_escalates_after_60_and_30_seconds() -> None:
    sequence = StopSequence()
    assert sequence.begin(Cause.user, 0)
    assert signals_until(sequence, 200) == [(0, "SIGINT"), (60, "SIGTERM"), (90, "SIGKILL")]


def test_k54_hard_stop_kills_at_once_and_replaces_what_was_due() -> None:
    sequence = StopSequence()
    sequence.begin(Cause.user, 0)
    assert sequence.due(0) == "SIGINT"
    sequence.kill(Cause.user, 10)
    assert sequence.due(9) is None
    assert sequence.due(10) == "SIGKILL"
    assert signals_until(sequence, 200) == []


def test_a_second_soft_stop_does_not_start_the_sequence_again() -> None:
    sequence = StopSequence()
    sequence.begin(Cause.time_limit, 0)
    assert sequence.due(0) == "SIGINT"
    assert not sequence.begin(Cause.user, 30)
    assert sequence.cause is Cause.time_limit
    assert sequence.next_deadline == 60


def test_a_second_kill_does_not_send_the_signal_twice() -> None:
    sequence = StopSequence()
    sequence.kill(Cause.user, 0)
    assert sequence.due(0) == "SIGKILL"
    sequence.kill(Cause.user, 1)
    assert sequence.due(1) is None


def test_fencing_overrides_any_other_cause() -> None:
    sequence = StopSequence()
    sequence.begin(Cause.user, 0)
    sequence.kill(Cause.fenced, 1)
    assert sequence.cause is Cause.fenced


def test_waiting_is_given_up_only_long_after_the_kill() -> None:
    sequence = StopSequence(Patience(kill_seconds=30))
    sequence.kill(Cause.user, 0)
    assert not sequence.hopeless(100), "the signal was not sent yet"
    sequence.due(5)
    assert not sequence.hopeless(35)
    assert sequence.hopeless(36)


def test_m30_time_limit_counts_from_the_start_of_the_command() -> None:
    limits = Limits(time_limit_seconds=10)
    assert limits.exceeded(started_at=100, last_output_at=0, now=109.9) is None
    assert limits.exceeded(started_at=100, last_output_at=109, now=110) is Cause.time_limit


def test_m31_silence_counts_from_the_last_output_but_not_before_the_command() -> None:
    limits = Limits(no_output_timeout_seconds=10)
    assert limits.exceeded(started_at=100, last_output_at=0, now=109) is None
    assert limits.exceeded(started_at=100, last_output_at=105, now=114) is None
    assert limits.exceeded(started_at=100, last_output_at=105, now=115) is Cause.silence


@pytest.mark.parametrize("none", [None, 0])
def test_no_limit_is_none_or_zero(none: float | None) -> None:
    limits = Limits(time_limit_seconds=none, no_output_timeout_seconds=none)
    assert limits.exceeded(started_at=0, last_output_at=0, now=1e9) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (60, "1 min"), (5400, "1 h 30 min"), (28800, "8 h"), (3661, "1 h 1 min 1 s")],
)
def test_durations_read_like_limits_are_written(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
