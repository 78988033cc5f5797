"""Numbers that parts of the control plane tell about themselves. Without a listener telling them costs next to nothing.

Like logging it is one per process, so that whoever has something to tell needs neither an argument nor the extra
`observability`:

    telemetry.count(Count.reports, kind="output")
    telemetry.observe(Seconds.report_to_event, lag)

What can be read at any moment (queue depth, runs in flight) is not told here but asked for at each scrape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Protocol


class Count(str, Enum):
    """Things that happen, with the names of their labels."""

    reports = "reports_applied"  # kind
    ended = "executions_ended"  # status, group
    swept = "uploads_swept"  # store
    outages = "outages"  # step: what waited

    @property
    def labels(self) -> tuple[str, ...]:
        return _LABELS.get(self, ())


class Seconds(str, Enum):
    """Durations, with the names of their labels."""

    report_to_event = (
        "report_to_event_seconds"  # from the agent's report to the event in Dagster's log
    )
    lane = "lane_seconds"  # from handing an event over to a lane until it is stored
    phase = "execution_phase_seconds"  # phase, group

    @property
    def labels(self) -> tuple[str, ...]:
        return _LABELS.get(self, ())


_LABELS: dict[Count | Seconds, tuple[str, ...]] = {
    Count.reports: ("kind",),
    Count.ended: ("status", "group"),
    Count.swept: ("store",),
    Count.outages: ("step",),
    Seconds.phase: ("phase", "group"),
}


class Sink(Protocol):
    """Who listens. Called from any thread; must not block."""

    def count(self, what: Count, amount: float, labels: Mapping[str, str]) -> None: ...

    def observe(self, what: Seconds, seconds: float, labels: Mapping[str, str]) -> None: ...


_sink: Sink | None = None


def count(what: Count, amount: float = 1.0, **labels: str) -> None:
    if _sink is not None:
        _sink.count(what, amount, labels)


def observe(what: Seconds, seconds: float, **labels: str) -> None:
    if _sink is not None:
        _sink.observe(what, max(0.0, seconds), labels)


@contextmanager
def listening(sink: Sink) -> Iterator[None]:
    """Sends everything to `sink` while it lasts."""
    global _sink
    before, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = before
