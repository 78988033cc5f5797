"""When to send which signal, and why a command is cut short: decisions without I/O.

K-54: SIGINT; after 60 s SIGTERM; after another 30 s SIGKILL; a hard stop kills at once.
M-30: the time limit counts the user's command only. M-31: silence counts only while the command runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

SignalName = Literal["SIGINT", "SIGTERM", "SIGKILL"]


class Cause(str, Enum):
    """Why a command is being ended before its own end. The first cause decides the outcome."""

    user = "user"  # a stop request
    shutdown = "shutdown"  # the agent itself has to leave
    preempted = "preempted"  # the machine goes away
    time_limit = "time-limit"
    silence = "silence"
    fenced = "fenced"  # another attempt holds the lease: nothing of this one counts


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds between the signals of a soft stop."""

    interrupt_seconds: float = 60.0  # SIGINT to SIGTERM
    terminate_seconds: float = 30.0  # SIGTERM to SIGKILL
    kill_seconds: float = 30.0  # SIGKILL to giving up on the process


def patience_within(seconds_left: float | None, usual: Patience) -> Patience:
    """For a machine that goes away (K-53): SIGTERM at half of the time, SIGKILL at three quarters, so that the rest
    is left to store the outputs. Never later than usual.

    >>> patience_within(40.0, Patience()).interrupt_seconds
    20.0
    """
    if seconds_left is None:
        return usual
    return Patience(
        interrupt_seconds=min(usual.interrupt_seconds, seconds_left / 2),
        terminate_seconds=min(usual.terminate_seconds, seconds_left / 4),
        kill_seconds=min(usual.kill_seconds, seconds_left / 8),
    )


class StopSequence:
    """The signals that are due, each once. Times are monotonic seconds of the caller's clock."""

    def __init__(self, patience: Patience | None = None) -> None:
        self._patience = patience or Patience()
        self._deadlines: list[tuple[float, SignalName]] = []
        self.cause: Cause | None = None
        self.killed_at: float | None = None

    def begin(self, cause: Cause, now: float, patience: Patience | None = None) -> bool:
        """Starts a soft stop; False when one runs already: its cause stays, and signals that `patience` would send
        earlier are brought forward."""
        if self.cause is not None:
            if patience is not None:
                self._hurry(now, patience)
            return False
        self.cause = cause
        self._patience = patience or self._patience
        terminate_at = now + self._patience.interrupt_seconds
        kill_at = terminate_at + self._patience.terminate_seconds
        self._deadlines = [(now, "SIGINT"), (terminate_at, "SIGTERM"), (kill_at, "SIGKILL")]
        return True

    def _hurry(self, now: float, patience: Patience) -> None:
        terminate_at = now + patience.interrupt_seconds
        latest = {"SIGTERM": terminate_at, "SIGKILL": terminate_at + patience.terminate_seconds}
        self._deadlines = [(min(at, latest.get(name, at)), name) for at, name in self._deadlines]
        self._patience = replace(
            self._patience,
            kill_seconds=min(self._patience.kill_seconds, patience.kill_seconds),
        )

    def kill(self, cause: Cause, now: float) -> None:
        """A hard stop: SIGKILL is the only signal left."""
        self.cause = self.cause if self.cause and cause is not Cause.fenced else cause
        if self.killed_at is None:
            self._deadlines = [(now, "SIGKILL")]

    def due(self, now: float) -> SignalName | None:
        """The next signal whose time has come."""
        if not self._deadlines or self._deadlines[0][0] > now:
            return None
        _, name = self._deadlines.pop(0)
        if name == "SIGKILL":
            self.killed_at = now
        return name

    def hopeless(self, now: float) -> bool:
        """Whether the process outlived SIGKILL for so long that waiting for it is pointless."""
        return self.killed_at is not None and now - self.killed_at > self._patience.kill_seconds

    @property
    def next_deadline(self) -> float | None:
        return self._deadlines[0][0] if self._deadlines else None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The two limits of one execution; None or 0 means none."""

    time_limit_seconds: float | None = None
    no_output_timeout_seconds: float | None = None

    def exceeded(self, *, started_at: float, last_output_at: float, now: float) -> Cause | None:
        """Which limit is reached. All three are monotonic seconds; `started_at` is the command's start."""
        if self.time_limit_seconds and now - started_at >= self.time_limit_seconds:
            return Cause.time_limit
        quiet_since = max(started_at, last_output_at)
        if self.no_output_timeout_seconds and now - quiet_since >= self.no_output_timeout_seconds:
            return Cause.silence
        return None


def format_duration(seconds: float) -> str:
    """A duration as people write limits: `1 h 30 min`, `2.5 s`."""
    if seconds < 60:
        return f"{seconds:g} s"
    whole = round(seconds)
    parts = [(whole // 3600, "h"), (whole % 3600 // 60, "min"), (whole % 60, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count)
