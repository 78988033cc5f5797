"""Whoever has a number to tell needs nobody who listens."""

from __future__ import annotations

from collections.abc import Mapping

from valohai_dagster import telemetry
from valohai_dagster.telemetry import Count, Seconds


class Noted:
    def __init__(self) -> None:
        self.all: list[tuple[str, float, dict[str, str]]] = []

    def count(self, what: Count, amount: float, labels: Mapping[str, str]) -> None:
        self.all.append((what.value, amount, dict(labels)))

    def observe(self, what: Seconds, seconds: float, labels: Mapping[str, str]) -> None:
        self.all.append((what.value, seconds, dict(labels)))


def test_without_a_listener_numbers_go_nowhere():
    telemetry.count(Count.reports, kind="output")
    telemetry.observe(Seconds.lane, 1.0)


def test_a_listener_hears_everything_while_it_listens():
    outer, inner = Noted(), Noted()
    with telemetry.listening(outer):
        telemetry.count(Count.reports, kind="output")
        with telemetry.listening(inner):
            telemetry.observe(Seconds.lane, 0.5)
        telemetry.count(Count.outages, 2, step="reports")
    telemetry.count(Count.reports, kind="output")
    assert outer.all == [
        ("reports_applied", 1.0, {"kind": "output"}),
        ("outages", 2, {"step": "reports"}),
    ]
    assert inner.all == [("lane_seconds", 0.5, {})]


def test_clocks_that_disagree_give_no_negative_times():
    noted = Noted()
    with telemetry.listening(noted):
        telemetry.observe(Seconds.report_to_event, -0.2)
    assert noted.all == [("report_to_event_seconds", 0.0, {})]
