"""How an attempt counts, decided from what was observed: a pure function and the words for it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from valohai_agent.protocol import Outcome
from valohai_agent.runtimes.base import ExitStatus
from valohai_agent.stopping import Cause, Limits, format_duration

_SHELL_CODES = {
    126: "the command was found but cannot be executed (permission, or not a program for this machine)",
    127: "command not found: check its name, and that it is installed where the command runs",
}


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What is known at the end. `exit` is None when the command never ran."""

    exit: ExitStatus | None = None
    cause: Cause | None = None
    stop_requested: bool = False
    stop_reason: str = ""
    reclaimed: str = ""  # who reclaims the machine
    failure: str | None = None  # why the command could not be started, or was given up
    output_problems: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    outcome: Outcome
    reason: str | None = None
    exit_code: int | None = None
    preempted: bool = False


def judge(seen: Observed) -> Verdict:
    """The first cause decides; a user's stop makes it `stopped` however the command ended (L-03).

    C-20: otherwise the exit code of the last command; O-18: an output that could not be stored is an error.
    """
    code = seen.exit.code if seen.exit else None
    if seen.cause is Cause.time_limit or seen.cause is Cause.silence:
        return Verdict(
            outcome=Outcome.error, reason=limit_words(seen.cause, seen.limits), exit_code=code
        )
    if seen.cause is Cause.shutdown or seen.cause is Cause.preempted:
        reason = _SHUTDOWN if seen.cause is Cause.shutdown else _preempted_words(seen)
        return Verdict(outcome=Outcome.error, reason=reason, exit_code=code, preempted=True)
    if seen.cause is Cause.user or seen.stop_requested:
        reason = seen.stop_reason or "stopped on request"
        return Verdict(outcome=Outcome.stopped, reason=reason, exit_code=code)
    problems = [
        *([seen.failure] if seen.failure else []),
        *exit_words(seen.exit),
        *seen.output_problems,
    ]
    if problems:
        return Verdict(outcome=Outcome.error, reason=_join(problems), exit_code=code)
    return Verdict(outcome=Outcome.complete, exit_code=code)


_SHUTDOWN = (
    "the worker agent was shut down before the command ended; outputs up to then are stored. Launch the step again, "
    "and stop agents with one SIGTERM so that they finish what they run."
)


def _preempted_words(seen: Observed) -> str:
    kept = "its outputs up to then are stored" if seen.exit else "it had not begun"
    return f"{seen.reclaimed or 'the machine goes away'}; the command was cut short, {kept}"


def limit_words(cause: Cause, limits: Limits) -> str:
    """The status line of a limit (M-30, M-31)."""
    if cause is Cause.time_limit:
        return f"Time limit of {format_duration(limits.time_limit_seconds or 0)} exceeded"
    return f"No output for {format_duration(limits.no_output_timeout_seconds or 0)}"


def exit_words(exit_status: ExitStatus | None) -> list[str]:
    """Why the exit is not a success; empty for code 0."""
    if exit_status is None or exit_status.code == 0:
        return []
    code = exit_status.code
    if not exit_status.started:
        return [exit_status.message or "the command could not be started"]
    meaning = exit_status.message or _SHELL_CODES.get(code) or _signal_words(code)
    if exit_status.oom_killed and not exit_status.message:
        meaning = "killed because the memory ran out; use a larger worker or less memory"
    return [f"the command ended with exit code {code}" + (f": {meaning}" if meaning else "")]


def _signal_words(code: int) -> str:
    """C-29: 128+n means killed by signal n."""
    try:
        return f"killed by {signal.Signals(code - 128).name}" if code > 128 else ""
    except ValueError:
        return ""


def _join(problems: Sequence[str], most: int = 5) -> str:
    shown = "; ".join(problems[:most])
    return shown if len(problems) <= most else f"{shown}; and {len(problems) - most} more"
