"""An ended execution with two phases, for the tests of this folder."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from valohai_agent.protocol import PhaseSpan
from valohai_dagster.executions.stream import (
    EventKind,
    ExecutionStatus,
    ExecutionView,
    FollowEvent,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def ended_view(**values: Any) -> ExecutionView:
    """Created at noon, queued for 3 s, pulled for 10 s and ran for 60 s."""
    given: dict[str, Any] = {
        "id": "e1",
        "counter": 12,
        "project": "digits",
        "project_id": "p1",
        "step": "train",
        "commit": "c0ffee",
        "image": "python:3.11",
        "status": ExecutionStatus.complete,
        "environment": "gpus",
        "group": "gpu",
        "run_id": "r1",
        "worker": "w1",
        "ctime": at(0),
        "qtime": at(1),
        "started_at": at(4),
        "ended_at": at(75),
        "phases": [
            PhaseSpan(phase="pulling", started_at=at(4), ended_at=at(14)),
            PhaseSpan(phase="running", started_at=at(14), ended_at=at(74)),
        ],
        **values,
    }
    return ExecutionView(**given)


def final(view: ExecutionView) -> FollowEvent:
    return FollowEvent(kind=EventKind.final, time=at(75), data=view.model_dump(mode="json"))
