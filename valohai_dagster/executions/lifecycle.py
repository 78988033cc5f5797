"""Decisions about one execution's life, without I/O.

The service observes (a report, a lease, a stop request), asks here what it means, writes the answer to the
records, and only then acts. States and transitions are CONTRACT 8.1; losses follow the one table of the protocol:
a lost lease is first suspected, and only a confirmed death or an expired grace starts another attempt.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum

from valohai_agent.protocol import Outcome
from valohai_dagster.executions.stream import ExecutionStatus as Status

MAX_INFRASTRUCTURE_ATTEMPTS = 3
MAX_RESTARTS = 10  # L-32; counted apart from the attempts of one execution
PARTITION_GRACE = timedelta(seconds=300)
STOP_ACKNOWLEDGEMENT = timedelta(seconds=15)  # longer silence after a stop request is said


class Verdict(str, Enum):
    """What to do with a report."""

    apply = "apply"
    replay = "replay"  # applied before: repeat only what followers or the agent may have missed
    fence = "fence"  # a past attempt speaks: drop it, tell the agent to stop
    drop = "drop"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How the records see an execution when a report arrives; `token` is None until the attempt is leased."""

    status: Status
    attempt: int
    token: str | None
    last_seq: int


def judge_report(
    standing: Standing, *, attempt: int, token: str, seq: int, lease_token: str | None
) -> Verdict:
    """Whether a report may take effect.

    Reports carry the fencing token of their lease. The first report of an attempt binds its token, provided
    that the lease in Redis (`lease_token`) agrees or is already gone again.
    """
    if attempt != standing.attempt:
        return Verdict.fence if attempt < standing.attempt else Verdict.drop
    if standing.token is None:
        if standing.status.final:
            return Verdict.fence
        return Verdict.apply if lease_token in (None, token) else Verdict.fence
    if token != standing.token:
        return Verdict.fence
    if seq <= standing.last_seq:
        return Verdict.replay
    return Verdict.fence if standing.status.final else Verdict.apply


def status_after_lease(status: Status) -> Status:
    return Status.started if status in (Status.created, Status.queued) else status


def status_after_stop(status: Status, *, hard: bool) -> Status:
    """A stop of work in progress (L-02, L-20); withdrawing a waiting execution is the caller's part."""
    if status.final:
        return status
    return Status.stopping_hard if hard or status is Status.stopping_hard else Status.stopping


def status_after_finish(outcome: Outcome, *, stop_requested: bool) -> Status:
    """L-03: what ends while it is being stopped counts as stopped, however it ended."""
    if stop_requested or outcome is Outcome.stopped:
        return Status.stopped
    return Status.complete if outcome is Outcome.complete else Status.error


class LossStep(str, Enum):
    wait = "wait"
    suspect = "suspect"
    requeue = "requeue"
    give_up = "give-up"
    stopped = "stopped"
    reclaimed = "reclaimed"  # `after_reclaim` decides


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A lease that is gone while its execution is not finished."""

    suspected_at: datetime | None
    death_confirmed: bool
    stop_requested: bool
    attempt: int
    reclaimed_at: datetime | None = None  # by when its cloud had announced to take the machine


def judge_loss(
    loss: Loss,
    now: datetime,
    *,
    grace: timedelta = PARTITION_GRACE,
    max_attempts: int = MAX_INFRASTRUCTURE_ATTEMPTS,
) -> LossStep:
    """The next step for a silent attempt.

    "Cannot reach" is not "failed": without a confirmed death the grace runs first, since the container may
    well be computing on. A machine that is silent after the time for which its cloud had announced to take it away is
    gone; before that time silence is as with any other.
    Infrastructure attempts are bounded and never count as the user's retries.
    """
    expired = loss.suspected_at is not None and now - loss.suspected_at >= grace
    due = loss.reclaimed_at
    taken = due is not None and (loss.death_confirmed or now >= due)
    if not (loss.death_confirmed or expired or taken):
        return LossStep.suspect if loss.suspected_at is None else LossStep.wait
    if loss.stop_requested:
        return LossStep.stopped
    if taken:
        return LossStep.reclaimed
    return LossStep.give_up if loss.attempt >= max_attempts else LossStep.requeue


class AfterReclaim(str, Enum):
    """What follows an attempt that was cut short because its machine goes away."""

    again = "again"  # the same execution, another attempt: nothing was lost
    restart = "restart"  # another execution that continues it (L-30)
    end = "end"


def after_reclaim(
    *,
    began: bool,
    autorestart: bool,
    restarts: int,
    attempt: int,
    max_attempts: int = MAX_INFRASTRUCTURE_ATTEMPTS,
) -> AfterReclaim:
    """`began`: whether the command did. `restarts`: of the executions before it (L-31, L-32)."""
    if not began and attempt < max_attempts:
        return AfterReclaim.again
    if autorestart and restarts < MAX_RESTARTS:
        return AfterReclaim.restart
    return AfterReclaim.end
