"""What the execution service has said of one execution and its run has not looked at yet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from valohai_agent.protocol import utcnow
from valohai_dagster import telemetry
from valohai_dagster.executions.stream import EventKind, ExecutionView, FollowEvent
from valohai_dagster.telemetry import Seconds

KEPT = 64  # events of one execution that wait for its run; older ones are let go of


class Mailbox:
    """Bounded: a run that lags behind misses lines, never the end."""

    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}  # metadata since the last look
        self.final: ExecutionView | None = None
        self.final_reported_at: datetime | None = None
        self._events: deque[FollowEvent] = deque(maxlen=KEPT)
        self._news = asyncio.Event()

    def put(self, events: Sequence[FollowEvent]) -> None:
        for event in events:
            if event.kind is EventKind.final:
                self.final = event.view or ExecutionView.model_validate(event.data)
                self.final_reported_at = event.reported_at
            elif event.kind is EventKind.metadata:
                self.latest.update(event.data.get("latest") or {})
                continue  # no reason to wake anybody
            elif event.kind in (EventKind.state, EventKind.warning):
                self._events.append(event)
            else:
                continue
            self._news.set()

    def take(self) -> list[FollowEvent]:
        events = list(self._events)
        self._events.clear()
        self._news.clear()
        return events

    async def wait(self, timeout: float | None) -> None:
        """Until there is news, at most `timeout` seconds."""
        try:
            await asyncio.wait_for(self._news.wait(), timeout)
        except asyncio.TimeoutError:
            return


def told_in_log(reported_at: datetime | None) -> None:
    """What an agent reported then is in Dagster's log now."""
    if reported_at is not None:
        telemetry.observe(Seconds.report_to_event, (utcnow() - reported_at).total_seconds())
