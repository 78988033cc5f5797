"""OpenTelemetry spans of ended executions: one per execution, below it one per phase.

They are made from the execution's record once it has ended, so nothing is lost with a conductor, and times are those of
the records, not of a worker's wrong clock. Ids come from `trace_context`: user code may have begun spans below ours.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.executions.timing import spans_of
from valohai_dagster.executions.trace_context import span_id_of, trace_id_of
from valohai_dagster.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter

    from valohai_dagster.settings import Settings

log = logging.getLogger(__name__)

FAILED = (ExecutionStatus.error, ExecutionStatus.crashed)


class Spans:
    """Hands spans to a processor, which sends them from a thread of its own and drops them when it cannot."""

    def __init__(self, processor: SpanProcessor, *, deployment: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        named = "OTEL_SERVICE_NAME" in os.environ
        about = {} if named else {"service.name": "valohai-dagster"}
        facts = {"service.version": __version__, "valohai.deployment": deployment}
        self._resource = Resource.create({**about, **facts})
        self._scope = InstrumentationScope("valohai_dagster", __version__)
        self._processor = processor

    def write(self, view: ExecutionView) -> None:
        """All spans of an ended execution."""
        for span in spans_of_execution(view, resource=self._resource, scope=self._scope):
            self._processor.on_end(span)

    def close(self) -> None:
        """Sends what is not sent yet, for a bounded time."""
        self._processor.shutdown()


def open_spans(
    settings: Settings, *, deployment: str, exporter: SpanExporter | None = None
) -> Spans | None:
    """None without an endpoint. Without the extra it says so and goes on without spans."""
    if settings.spans_endpoint is None and exporter is None:
        return None
    try:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        text = "no spans are sent to %s: install valohai-dagster[observability]"
        log.warning(text, settings.spans_endpoint, extra={"action": "observability"})
        return None
    processor = BatchSpanProcessor(exporter or _exporter(str(settings.spans_endpoint)))
    return Spans(processor, deployment=deployment)


def _exporter(endpoint: str) -> SpanExporter:
    """Headers, time-outs and certificates come from the OTEL_EXPORTER_OTLP_* variables."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    path = "/v1/traces"
    base = endpoint.rstrip("/")
    return OTLPSpanExporter(endpoint=base if base.endswith(path) else base + path)


def spans_of_execution(view: ExecutionView, *, resource: Any, scope: Any) -> list[ReadableSpan]:
    """The execution's span last, as spans end."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

    trace = trace_id_of(view.run_id, view.id)

    def context(part: str = "") -> SpanContext:
        flags = TraceFlags(TraceFlags.SAMPLED)
        return SpanContext(trace, span_id_of(view.id, part), is_remote=False, trace_flags=flags)

    failed = view.status in FAILED
    status = Status(StatusCode.ERROR, view.reason) if failed else Status(StatusCode.OK)
    shared = {"resource": resource, "instrumentation_scope": scope, "kind": SpanKind.INTERNAL}
    spans = [
        ReadableSpan(
            name=span.phase,
            context=context(f"{view.attempt}/{number}/{span.phase}"),
            parent=context(),
            attributes={"valohai.phase": span.phase, "valohai.execution.id": view.id},
            start_time=_nanoseconds(span.started_at),
            end_time=_nanoseconds(span.ended_at),
            **shared,
        )
        for number, span in enumerate(spans_of(view))
    ]
    whole = ReadableSpan(
        name=f"{view.project}/{view.step}",
        context=context(),
        attributes=attributes_of(view),
        status=status,
        start_time=_nanoseconds(view.ctime),
        end_time=_nanoseconds(view.ended_at or view.ctime),
        **shared,
    )
    return [*spans, whole]


def attributes_of(view: ExecutionView) -> Mapping[str, str | int]:
    values: dict[str, str | int | None] = {
        "valohai.project": view.project,
        "valohai.step": view.step,
        "valohai.execution.id": view.id,
        "valohai.execution.number": view.counter,
        "valohai.commit": view.commit,
        "valohai.environment": view.environment,
        "valohai.group": view.group,
        "valohai.attempt": view.attempt,
        "valohai.status": view.status.value,
        "valohai.exit_code": view.exit_code,
        "valohai.worker": view.worker,
        "valohai.runtime": view.runtime,
        "host.name": view.host,
        "container.image.name": view.image,
        "dagster.run_id": view.run_id,
        "dagster.step_key": view.step_key,
    }
    return {name: value for name, value in values.items() if value is not None}


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000) * 1_000
