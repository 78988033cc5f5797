"""What each kind of report changes in the records, and what its followers are told.

One function per report kind, called inside the transaction that also advances the attempt's sequence number:
an effect happens once, however often its report is delivered.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from valohai_agent import protocol as p
from valohai_dagster.data.printable import printable
from valohai_dagster.data.sidecar_effects import apply_sidecar_effects
from valohai_dagster.executions import ledger
from valohai_dagster.executions.lifecycle import status_after_finish, status_after_lease
from valohai_dagster.executions.stream import EventKind, FollowEvent
from valohai_dagster.executions.views import DatumUrl, datum_view
from valohai_dagster.records import tables as t

MAX_METADATA_EVENTS = 100_000  # per execution; later ones only move the latest values


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A report being applied."""

    conn: sa.Connection
    active: ledger.Active
    report: p.Report
    now: datetime
    datum_url: DatumUrl | None = None

    def event(self, kind: EventKind, message: str = "", **data: Any) -> FollowEvent:
        return FollowEvent(
            kind=kind, time=self.now, attempt=self.report.attempt, message=message, data=data
        )

    def state(self, message: str, **data: Any) -> FollowEvent:
        return self.event(EventKind.state, message, **data)


def apply_report(cause: Cause) -> list[FollowEvent]:
    """Applies the report and returns the events to publish, in order."""
    report = cause.report
    ledger.update_attempt(cause.conn, report.execution_id, report.attempt, last_seq=report.seq)
    return _apply(report.body, cause)


@functools.singledispatch
def _apply(body: Any, cause: Cause) -> list[FollowEvent]:
    return []


@_apply.register
def _(body: p.Leased, cause: Cause) -> list[FollowEvent]:
    active, report = cause.active, cause.report
    status = status_after_lease(active.status)
    ledger.update_attempt(
        cause.conn,
        active.id,
        report.attempt,
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
    ledger.update(cause.conn, active.id, status=status.value, **started)
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
    conn, c = cause.conn, t.execution_inputs.c
    mine = sa.and_(c.execution_id == cause.active.id, c.file_id == body.file_id)
    uri = conn.execute(sa.select(c.uri).where(mine)).scalar_one_or_none()
    values = {
        "name": body.name,
        "size": body.size,
        "cached": body.cached,
        **body.checksums.model_dump(),
    }
    conn.execute(t.execution_inputs.update().where(mine).values(**values))
    if uri is None or not _changed_since_last_use(cause, uri, body.checksums.sha256):
        return []
    text = f"the content of {uri} differs from its last use by an earlier execution"
    return [cause.event(EventKind.warning, text)]


def _changed_since_last_use(cause: Cause, uri: str, sha256: str | None) -> bool:
    """I-32: outside content under one URI that is not what an earlier execution saw."""
    c = t.execution_inputs.c
    query = (
        sa.select(c.sha256)
        .join(t.executions, t.executions.c.id == c.execution_id)
        .where(c.uri == uri, c.execution_id != cause.active.id, c.sha256.is_not(None))
        .order_by(t.executions.c.ctime.desc())
        .limit(1)
    )
    last = cause.conn.execute(query).scalar_one_or_none()
    return bool(sha256 and last and last != sha256)


@_apply.register
def _(body: p.MetadataEvents, cause: Cause) -> list[FollowEvent]:
    conn, c = cause.conn, t.metadata_events.c
    execution_id = cause.active.id
    highest = conn.execute(
        sa.select(sa.func.max(c.number)).where(c.execution_id == execution_id)
    ).scalar()
    first = (highest or 0) + 1
    rows = [
        {
            "execution_id": execution_id,
            "number": number,
            "attempt": cause.report.attempt,
            "time": _event_time(values, cause.now),
            "values": values,
        }
        for number, values in enumerate(body.events, first)
        if number <= MAX_METADATA_EVENTS
    ]
    if rows:
        conn.execute(t.metadata_events.insert(), rows)
    latest = dict(ledger.row_of(conn, execution_id).cumulative_metadata or {})
    for values in body.events:
        latest.update(values)
    ledger.update(conn, execution_id, cumulative_metadata=latest)
    return [cause.event(EventKind.metadata, events=body.events, latest=latest)]


def _event_time(values: dict[str, Any], default: datetime) -> datetime:
    try:
        time = datetime.fromisoformat(str(values["_time"]).replace("Z", "+00:00"))
    except (KeyError, ValueError):
        return default
    return time if time.tzinfo else time.replace(tzinfo=default.tzinfo)


@_apply.register
def _(body: p.OutputStored, cause: Cause) -> list[FollowEvent]:
    grant = _accept_grant(cause, body.upload_id, "output")
    if grant is None and _is_mine(cause, body.upload_id):
        return _replace_metadata(
            cause, body
        )  # O-08: said again at the end, with what came to be known
    if grant is None:
        text = f"output {body.name!r} was reported without a grant for it and is left out"
        return [cause.event(EventKind.warning, text)]
    row = ledger.row_of(cause.conn, cause.active.id)
    cause.conn.execute(
        t.datums.insert().values(
            id=body.upload_id,
            name=body.name,
            size=body.size,
            store=grant.store,
            key=grant.key,
            project_id=row.project_id,
            execution_id=row.id,
            tags=[],
            metadata=body.metadata,
            live=body.live,
            ctime=cause.now,
            file_ctime=body.file_ctime,
            file_mtime=body.file_mtime,
            **body.checksums.model_dump(),
        )
    )
    events = _sidecar_warnings(cause, body, row.project_id)
    datum = cause.conn.execute(sa.select(t.datums).where(t.datums.c.id == body.upload_id)).one()
    view = datum_view(datum, cause.datum_url).model_dump(mode="json")
    return [*events, cause.event(EventKind.output, f"stored output {printable(body.name)}", **view)]


def _sidecar_warnings(cause: Cause, body: p.OutputStored, project_id: str) -> list[FollowEvent]:
    """Applies what reserved metadata keys ask for (O-09); what cannot be done is said, the datum stays."""
    warnings = apply_sidecar_effects(
        cause.conn,
        datum_id=body.upload_id,
        project_id=project_id,
        metadata=body.metadata,
        now=cause.now,
    )
    return [cause.event(EventKind.warning, text) for text in warnings]


def _is_mine(cause: Cause, upload_id: str) -> bool:
    """Whether that datum is an output of this very execution."""
    c = t.datums.c
    query = sa.select(c.id).where(c.id == upload_id, c.execution_id == cause.active.id)
    return cause.conn.execute(query).first() is not None


def _replace_metadata(cause: Cause, body: p.OutputStored) -> list[FollowEvent]:
    mine = t.datums.c.id == body.upload_id
    cause.conn.execute(t.datums.update().where(mine).values(metadata=body.metadata))
    project_id = ledger.row_of(cause.conn, cause.active.id).project_id
    return _sidecar_warnings(cause, body, project_id)


def _accept_grant(cause: Cause, upload_id: str, kind: str) -> Any:
    """The grant, now used up; None if this attempt was never given it or has used it before."""
    c = t.grants.c
    mine = sa.and_(
        c.upload_id == upload_id,
        c.execution_id == cause.active.id,
        c.attempt == cause.report.attempt,
        c.kind == kind,
        c.accepted.is_(False),
    )
    grant = cause.conn.execute(sa.select(t.grants).where(mine)).one_or_none()
    if grant is not None:
        cause.conn.execute(t.grants.update().where(mine).values(accepted=True))
    return grant


@_apply.register
def _(body: p.StatusDetail, cause: Cause) -> list[FollowEvent]:
    ledger.update(cause.conn, cause.active.id, status_detail=body.text)
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
    left = "" if body.seconds_left is None else f", {body.seconds_left:.0f} s left"
    return [
        cause.event(
            EventKind.warning, f"the machine of {cause.report.worker} is being reclaimed{left}"
        )
    ]


@_apply.register
def _(body: p.Finished, cause: Cause) -> list[FollowEvent]:
    active, report = cause.active, cause.report
    status = status_after_finish(body.outcome, stop_requested=active.stop_requested > 0)
    asked = ledger.row_of(cause.conn, active.id).reason if active.stop_requested else None
    ledger.update(
        cause.conn,
        active.id,
        status=status.value,
        reason=asked or body.reason,
        exit_code=body.exit_code,
        phases=[_on_our_clock(span, report) for span in body.phases],
        usage=body.usage.model_dump(mode="json"),
        interpolated_command=body.interpolated_command,
        ended_at=cause.now,
    )
    ledger.update_attempt(
        cause.conn,
        active.id,
        report.attempt,
        ended_at=cause.now,
        end="finished",
        reason=body.reason,
        logs=_stored_logs(body, cause),
    )
    return []  # the service publishes `final` once the transaction is done


def _on_our_clock(span: p.PhaseSpan, report: p.Report) -> dict[str, Any]:
    """The span shifted by the measured offset, so that a worker's wrong clock does not bend our records."""
    offset = timedelta(seconds=report.clock_offset_seconds)
    shifted = {"started_at": span.started_at + offset, "ended_at": span.ended_at + offset}
    return span.model_copy(update=shifted).model_dump(mode="json")


def _stored_logs(body: p.Finished, cause: Cause) -> dict[str, Any]:
    logs = {}
    for log in body.logs:
        grant = _accept_grant(cause, log.upload_id, "log")
        if grant is not None:
            logs[log.stream] = {
                "store": grant.store,
                "key": grant.key,
                "size": log.size,
                "lines": log.lines,
                "complete": True,
            }
    return logs
