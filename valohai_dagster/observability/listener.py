"""What is told of each execution that ends, once: to the metrics, and as spans."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from valohai_dagster import telemetry
from valohai_dagster.executions.stream import EventKind, ExecutionView, FollowEvent
from valohai_dagster.executions.timing import spans_of
from valohai_dagster.telemetry import Count, Seconds

if TYPE_CHECKING:
    from valohai_dagster.observability.spans import Spans

REMEMBERED = 10_000  # ends; one that is told again, such as to a late follower, counts once


class EndListener:
    """For `ExecutionService.listen`."""

    def __init__(self, spans: Spans | None = None) -> None:
        self._spans = spans
        self._told: OrderedDict[str, None] = OrderedDict()

    def __call__(self, execution_id: str, events: Sequence[FollowEvent]) -> None:
        for event in events:
            if event.kind is EventKind.final and self._is_new(execution_id):
                self._ended(event.view or ExecutionView.model_validate(event.data))

    def _is_new(self, execution_id: str) -> bool:
        if execution_id in self._told:
            return False
        self._told[execution_id] = None
        if len(self._told) > REMEMBERED:
            self._told.popitem(last=False)
        return True

    def _ended(self, view: ExecutionView) -> None:
        telemetry.count(Count.ended, status=view.status.value, group=view.group)
        for span in spans_of(view):
            seconds = (span.ended_at - span.started_at).total_seconds()
            telemetry.observe(Seconds.phase, seconds, phase=span.phase, group=view.group)
        if self._spans is not None:
            self._spans.write(view)
