"""How long an execution was in each phase; waiting in the queue is one of them."""

from __future__ import annotations

from valohai_agent.protocol import PhaseSpan
from valohai_dagster.executions.stream import ExecutionView

QUEUED = "queued"
PHASES: tuple[str, ...] = (QUEUED, "preparing", "pulling", "downloading", "running", "uploading")


def spans_of(view: ExecutionView) -> list[PhaseSpan]:
    """The phases of the last attempt in order, on our clock; `queued` is from the queue to the first of them."""
    begun = min((span.started_at for span in view.phases), default=view.started_at)
    if view.qtime is None or begun is None or begun < view.qtime:
        return list(view.phases)
    return [PhaseSpan(phase=QUEUED, started_at=view.qtime, ended_at=begun), *view.phases]


def phase_seconds(view: ExecutionView) -> dict[str, float]:
    """Seconds by phase, 0 for one that the execution did not have."""
    spent: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for span in spans_of(view):
        length = (span.ended_at - span.started_at).total_seconds()
        spent[span.phase] = spent.get(span.phase, 0.0) + max(0.0, length)
    return {name: round(seconds, 3) for name, seconds in spent.items()}
