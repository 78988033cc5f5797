"""Spans of ended executions, as an exporter gets them."""

from __future__ import annotations

import logging
import sys

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tests.unit.observability.ended import at, ended_view
from valohai_dagster.executions.stream import ExecutionStatus
from valohai_dagster.executions.trace_context import traceparent_of
from valohai_dagster.observability.spans import open_spans
from valohai_dagster.settings import Settings


def exported(**values: object) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    spans = open_spans(Settings(), deployment="d1", exporter=exporter)
    assert spans is not None
    spans.write(ended_view(**values))
    spans.close()
    return list(exporter.get_finished_spans())


def test_an_execution_is_a_span_with_one_below_it_for_each_phase():
    *phases, whole = exported()
    assert whole.name == "digits/train"
    assert [span.name for span in phases] == ["queued", "pulling", "running"]
    assert all(span.parent == whole.context for span in phases)
    assert whole.parent is None
    assert len({span.context.span_id for span in [*phases, whole] if span.context}) == 4


def test_times_are_those_of_the_records():
    queued, _, running, whole = exported()
    assert (whole.start_time, whole.end_time) == (
        int(at(0).timestamp()) * 10**9,
        int(at(75).timestamp()) * 10**9,
    )
    assert queued.start_time == int(at(1).timestamp()) * 10**9
    assert running.end_time == int(at(74).timestamp()) * 10**9


def test_attributes_name_project_step_run_and_execution():
    whole = exported(step_key="digits__train")[-1]
    attributes = dict(whole.attributes or {})
    assert attributes["valohai.project"] == "digits"
    assert attributes["valohai.step"] == "train"
    assert attributes["valohai.execution.id"] == "e1"
    assert attributes["dagster.run_id"] == "r1"
    assert attributes["dagster.step_key"] == "digits__train"
    assert "valohai.exit_code" not in attributes
    resource = dict(whole.resource.attributes)
    assert (resource["service.name"], resource["valohai.deployment"]) == ("valohai-dagster", "d1")


def test_the_service_may_be_named_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    assert exported()[-1].resource.attributes["service.name"] == "ours"


def test_the_users_own_spans_are_below_the_executions():
    context = exported()[-1].context
    assert context is not None
    assert traceparent_of("r1", "e1") == f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


def test_a_failure_is_an_error_with_its_reason():
    whole = exported(status=ExecutionStatus.error, reason="exit code 3")[-1]
    assert whole.status.status_code is StatusCode.ERROR
    assert whole.status.description == "exit code 3"
    assert exported(status=ExecutionStatus.stopped)[-1].status.status_code is StatusCode.OK


def test_without_an_endpoint_there_are_no_spans(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert open_spans(Settings(), deployment="d1") is None


def test_without_the_extra_that_is_said_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    with caplog.at_level(logging.WARNING):
        assert open_spans(Settings(), deployment="d1") is None
    assert "valohai-dagster[observability]" in caplog.text
