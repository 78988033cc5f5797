"""What each kind of report changes in the records, and what its followers are told.

One function per report kind, called inside the transaction that also advances the attempt's sequence number:
an effect happens once, however often its report is delivered. Reports that only tell something change nothing there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa

from valohai_agent import protocol as p
from valohai_dagster.data.printable import printable
from valohai_dagster.data.sidecar_effects import apply_sidecar_effects
from valohai_dagster.executions.inputs_ready import record_inputs
from valohai_dagster.executions.lifecycle import status_after_finish, status_after_lease
from valohai_dagster.executions.memory import Active, Grant, Metrics
from valohai_dagster.executions.remarks import keep_warnings
from valohai_dagster.executions.stream import EventKind, FollowEvent
from valohai_dagster.executions.views import DatumUrl, datum_view
from valohai_dagster.executions.writing import Writing
from valohai_dagster.records import tables as t

MAX_METADATA_EVENTS = 100_000  # per execution; later ones only move the latest values

# They tell followers something and are told again by their agent if this process dies before it has; the number of the
# last one is written with the next report that changes something.
_ONLY_TOLD = (
    p.PhaseChanged,
    p.GrantsWanted,
    p.Warned,
    p.StopAcknowledged,
    p.LostLease,
)


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A report being applied."""

    writing: Writing
    active: Active
    report: p.Report
    datum_url: DatumUrl | None = None

    @property
    def now(self) -> datetime:
        return self.writing.now

    def event(self, kind: EventKind, message: str = "", **data: Any) -> FollowEvent:
        return FollowEvent(
            kind=kind,
            time=self.now,
            reported_at=moment_of(self.report),
            attempt=self.report.attempt,
            message=message,
            data=data,
        )

    def state(self, message: str, **data: Any) -> FollowEvent:
        return self.event(EventKind.state, message, **data)

    def warn(self, *texts: str) -> list[FollowEvent]:
        """Keeps the warnings with the execution; the events of those that are new."""
        kept = keep_warnings(self.writing, self.active, texts)
        return [self.event(EventKind.warning, text) for text in kept]

    def change(self, **values: Any) -> None:
        """The execution with other values in memory, on top of what this report has changed already."""
        current = self.writing.find(self.active.id) or self.active
        self.writing.change(current, **values)

    def update(self, **values: Any) -> None:
        self.writing.update(self.active, **values)

    def accept_grants(self, upload_ids: Sequence[str], kind: str) -> list[Grant]:
        return self.writing.accept_grants(self.active, upload_ids, kind)

    def update_attempt(self, **values: Any) -> None:
        self.writing.update_attempt(self.active, self.report.attempt, **values)


def apply_report(cause: Cause) -> list[FollowEvent]:
    """Applies the report and returns the events to publish, in order."""
    report = cause.report
    cause.change(last_seq=report.seq)
    if not isinstance(report.body, _ONLY_TOLD):
        cause.update_attempt(last_seq=report.seq)
    return _apply(report.body, cause)


@functools.singledispatch
def _apply(body: Any, cause: Cause) -> list[FollowEvent]:
    return []


@_apply.register
def _(body: p.Leased, cause: Cause) -> list[FollowEvent]:
    active, report = cause.active, cause.report
    status = status_after_lease(active.status)
    cause.update_attempt(
        token=report.token,
        worker=report.worker,
        host=body.host,
        runtime=body.runtime,
        machine_id=body.machine_id,
        agent_version=body.agent_version,
        leased_at=cause.now,
        suspected_at=None,
    )
    started = {} if report.attempt > 1 else {"started_at": cause.now}
    cause.update(status=status.value, **started)
    cause.change(status=status, token=report.token, worker=report.worker, suspected_at=None)
    message = leased_text(report.worker, body.host, body.runtime)
    return [cause.state(message, status=status.value, worker=report.worker)]


def leased_text(worker: str, host: str | None, runtime: str | None) -> str:
    return f"leased by worker {worker} on {host or 'an unnamed host'} ({runtime} runtime)"


@_apply.register
def _(body: p.PhaseChanged, cause: Cause) -> list[FollowEvent]:
    message = body.message or body.phase.value
    if body.done is None:
        return [cause.state(message, phase=body.phase.value)]
    data = {"phase": body.phase.value, "done": body.done, "total": body.total}
    return [cause.event(EventKind.progress, message, **data)]


@_apply.register
def _(body: p.InputReady, cause: Cause) -> list[FollowEvent]:
    return _inputs_ready([body], cause)


@_apply.register
def _(body: p.InputsReady, cause: Cause) -> list[FollowEvent]:
    return _inputs_ready(body.files, cause)


def _inputs_ready(files: Sequence[p.InputReady], cause: Cause) -> list[FollowEvent]:
    conn = cause.writing.touch(cause.active)
    warnings = record_inputs(conn, cause.active.id, files, cause.now)
    return cause.warn(*warnings) if warnings else []


@_apply.register
def _(body: p.MetadataEvents, cause: Cause) -> list[FollowEvent]:
    writing, execution_id = cause.writing, cause.active.id
    known = writing.metrics(execution_id)
    rows = [
        {
            "execution_id": execution_id,
            "number": number,
            "attempt": cause.report.attempt,
            "time": _event_time(values, cause.now),
            "values": values,
        }
        for number, values in enumerate(body.events, known.count + 1)
        if number <= MAX_METADATA_EVENTS
    ]
    if rows:
        writing.insert(cause.active, t.metadata_events, *rows)
    latest = dict(known.latest)
    for values in body.events:
        latest.update(values)
    writing.keep_metrics(execution_id, Metrics(count=known.count + len(rows), latest=latest))
    cause.update(cumulative_metadata=latest)
    return [cause.event(EventKind.metadata, events=body.events, latest=latest)]


def _event_time(values: dict[str, Any], default: datetime) -> datetime:
    try:
        time = datetime.fromisoformat(str(values["_time"]).replace("Z", "+00:00"))
    except (KeyError, ValueError):
        return default
    return time if time.tzinfo else time.replace(tzinfo=default.tzinfo)


@_apply.register
def _(body: p.OutputStored, cause: Cause) -> list[FollowEvent]:
    grant = next(iter(cause.accept_grants([body.upload_id], "output")), None)
    if grant is None and _is_mine(cause, body.upload_id):
        return _replace_metadata(
            cause, body
        )  # O-08: said again at the end, with what came to be known
    if grant is None:
        text = f"output {body.name!r} was reported without a grant for it and is left out"
        return [cause.event(EventKind.warning, text)]
    project_id = cause.writing.details(cause.active.id).project_id
    datum = {
        "id": body.upload_id,
        "name": body.name,
        "size": body.size,
        "store": grant.store,
        "key": grant.key,
        "project_id": project_id,
        "execution_id": cause.active.id,
        "tags": [],
        "metadata": body.metadata,
        "live": body.live,
        "ctime": cause.now,
        "file_ctime": body.file_ctime,
        "file_mtime": body.file_mtime,
        **body.checksums.model_dump(),
    }
    cause.writing.insert(cause.active, t.datums, datum)
    events = _sidecar_warnings(cause, body, project_id)
    view = datum_view(SimpleNamespace(**datum), cause.datum_url).model_dump(mode="json")
    return [*events, cause.event(EventKind.output, f"stored output {printable(body.name)}", **view)]


def _sidecar_warnings(cause: Cause, body: p.OutputStored, project_id: str) -> list[FollowEvent]:
    """Applies what reserved metadata keys ask for (O-09); what cannot be done is said, the datum stays."""
    if not body.metadata:
        return []
    warnings = apply_sidecar_effects(
        cause.writing.touch(cause.active, t.datums),
        datum_id=body.upload_id,
        project_id=project_id,
        execution_id=cause.active.id,
        metadata=body.metadata,
        now=cause.now,
    )
    return cause.warn(*warnings)


def _is_mine(cause: Cause, upload_id: str) -> bool:
    """Whether that datum is an output of this very execution."""
    c = t.datums.c
    mine = sa.and_(c.execution_id == cause.active.id, c.withdrawn.is_(False))
    query = sa.select(c.id).where(c.id == upload_id, mine)
    return cause.writing.touch(cause.active, t.datums).execute(query).first() is not None


def _replace_metadata(cause: Cause, body: p.OutputStored) -> list[FollowEvent]:
    mine = t.datums.c.id == body.upload_id
    conn = cause.writing.touch(cause.active, t.datums)
    conn.execute(t.datums.update().where(mine).values(metadata=body.metadata))
    project_id = cause.writing.details(cause.active.id).project_id
    return _sidecar_warnings(cause, body, project_id)


@_apply.register
def _(body: p.StatusDetail, cause: Cause) -> list[FollowEvent]:
    cause.update(status_detail=body.text)
    return [cause.event(EventKind.detail, body.text, status_detail=body.text)]


@_apply.register
def _(body: p.Warned, cause: Cause) -> list[FollowEvent]:
    return [cause.event(EventKind.warning, body.message)]


@_apply.register
def _(body: p.StopAcknowledged, cause: Cause) -> list[FollowEvent]:
    text = body.message or f"worker {cause.report.worker} sent {body.signal} to the command"
    return [cause.state(text, signal=body.signal)]


@_apply.register
def _(body: p.Preempted, cause: Cause) -> list[FollowEvent]:
    """L-30. An agent that is shut down says so too, and says nothing of the machine."""
    worker = cause.report.worker
    if body.withdrawn:
        cause.update_attempt(reclaimed_at=None)
        cause.change(reclaimed_at=None)
        return [cause.state(f"the machine of worker {worker} stays after all, the attempt goes on")]
    if not body.what:
        return [cause.event(EventKind.warning, f"the agent {worker} has to leave")]
    gone_at = moment_of(cause.report) + timedelta(seconds=body.seconds_left or 0.0)
    cause.update_attempt(reclaimed_at=gone_at)
    cause.change(reclaimed_at=gone_at)
    left = "" if body.seconds_left is None else f", {body.seconds_left:.0f} s left"
    text = f"{body.what}{left}: worker {worker} interrupts the command and stores its outputs"
    return [cause.event(EventKind.warning, text)]


@_apply.register
def _(body: p.Finished, cause: Cause) -> list[FollowEvent]:
    active, report = cause.active, cause.report
    status = status_after_finish(body.outcome, stop_requested=active.stop_requested > 0)
    cause.update(
        status=status.value,
        reason=active.stop_reason or body.reason,
        exit_code=body.exit_code,
        phases=[_on_our_clock(span, report) for span in body.phases],
        usage=body.usage.model_dump(mode="json"),
        interpolated_command=body.interpolated_command,
        ended_at=cause.now,
    )
    cause.update_attempt(
        ended_at=cause.now,
        end="finished",
        reason=body.reason,
        logs=_stored_logs(body, cause),
    )
    cause.change(status=status)
    return []  # the service publishes `final` once the transaction is done


def moment_of(report: p.Report) -> datetime:
    """When the agent made the report, on our clock."""
    time = report.time if report.time.tzinfo else report.time.replace(tzinfo=timezone.utc)
    return time + timedelta(seconds=report.clock_offset_seconds)


def _on_our_clock(span: p.PhaseSpan, report: p.Report) -> dict[str, Any]:
    """The span shifted by the measured offset, so that a worker's wrong clock does not bend our records."""
    offset = timedelta(seconds=report.clock_offset_seconds)
    shifted = {"started_at": span.started_at + offset, "ended_at": span.ended_at + offset}
    return span.model_copy(update=shifted).model_dump(mode="json")


def _stored_logs(body: p.Finished, cause: Cause) -> dict[str, Any]:
    if not body.logs:
        return {}
    accepted = cause.accept_grants([log.upload_id for log in body.logs], "log")
    grants = {grant.upload_id: grant for grant in accepted}
    return {
        log.stream: {
            "store": grants[log.upload_id].store,
            "key": grants[log.upload_id].key,
            "size": log.size,
            "lines": log.lines,
            "complete": True,
        }
        for log in body.logs
        if log.upload_id in grants
    }
