"""Each end is told once, to metrics and spans alike."""

from __future__ import annotations

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.unit.observability.ended import at, ended_view, final
from valohai_dagster import telemetry
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, FollowEvent
from valohai_dagster.observability.listener import EndListener
from valohai_dagster.observability.prometheus import Metrics
from valohai_dagster.observability.spans import open_spans
from valohai_dagster.settings import Settings


def text_after(*events: FollowEvent, listener: EndListener) -> str:
    metrics = Metrics()
    with telemetry.listening(metrics):
        listener("e1", list(events))
        listener("e1", list(events))  # as a late follower makes the service tell it
    return metrics.render([]).decode()


def test_an_end_counts_once_with_the_seconds_of_its_phases():
    text = text_after(final(ended_view()), listener=EndListener())
    assert 'valohai_executions_ended_total{group="gpu",status="complete"} 1.0' in text
    for phase, seconds in (("queued", 3.0), ("pulling", 10.0), ("running", 60.0)):
        line = f'valohai_execution_phase_seconds_sum{{group="gpu",phase="{phase}"}} {seconds}'
        assert line in text


def test_what_is_no_end_is_not_counted():
    event = FollowEvent(kind=EventKind.state, time=at(0), message="queued")
    assert "executions_ended_total{" not in text_after(event, listener=EndListener())


def test_an_execution_that_never_ran_has_no_phases():
    view = ended_view(status=ExecutionStatus.error, phases=[], started_at=None, qtime=None)
    text = text_after(final(view), listener=EndListener())
    assert 'status="error"} 1.0' in text
    assert "phase_seconds_sum{" not in text


def test_spans_are_written_once():
    exporter = InMemorySpanExporter()
    spans = open_spans(Settings(), deployment="d1", exporter=exporter)
    assert spans is not None
    text_after(final(ended_view()), listener=EndListener(spans))
    spans.close()
    assert len(exporter.get_finished_spans()) == 4
