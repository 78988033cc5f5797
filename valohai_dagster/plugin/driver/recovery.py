"""How a run goes on in another process: what its event log says has happened, and the repair of a torn last event."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dagster import DagsterEventType, DagsterInstance, EventLogEntry, EventLogRecord

from valohai_dagster.plugin.compat.engine import (
    DagsterEvent,
)
from valohai_dagster.plugin.compat.storage import complete_event

PAGE = 1_000  # records per read
NEWEST = 20  # records that are searched for an event whose writing was cut off

_STEP_ENDS = {
    DagsterEventType.STEP_SUCCESS,
    DagsterEventType.STEP_FAILURE,
    DagsterEventType.STEP_UP_FOR_RETRY,
}


def identity(entry: EventLogEntry) -> tuple[Any, ...]:
    """What makes an event of one try of a step the same event when another process would write it again."""
    event = entry.dagster_event
    if event is None:
        return ("line", entry.user_message)
    kind = event.event_type
    data: Any = event.event_specific_data
    if kind is DagsterEventType.ASSET_MATERIALIZATION:
        return (kind, data.materialization.asset_key, data.materialization.partition)
    if kind is DagsterEventType.ASSET_CHECK_EVALUATION:
        return (kind, data.asset_key, data.check_name, data.partition)
    if kind is DagsterEventType.STEP_OUTPUT:
        return (kind, data.step_output_handle.output_name)
    if kind is DagsterEventType.STEP_RESTARTED:
        return (DagsterEventType.STEP_START,)
    if kind is DagsterEventType.ENGINE_EVENT:
        which = [data.metadata.get(name) for name in ("attempt", "restart")] if data else []
        return (kind, event.message, *map(str, which))
    if kind is DagsterEventType.ASSET_OBSERVATION:
        return (kind, entry.timestamp)
    return (kind,)


@dataclass(kw_only=True)
class Past:
    """What the log says of a run."""

    started: bool = False  # RUN_START is there
    step_events: list[DagsterEvent] = field(default_factory=list)  # that move the plan, in order
    begun: set[str] = field(default_factory=set)  # steps whose present try has begun and not ended
    written: dict[str, set[tuple[Any, ...]]] = field(default_factory=lambda: defaultdict(set))
    start_times: dict[str, float] = field(default_factory=dict)  # step -> start of the present try
    retried_at: dict[str, float] = field(default_factory=dict)  # step -> its last STEP_UP_FOR_RETRY
    lines: set[str] = field(default_factory=set)  # plain lines and messages of the run itself

    @property
    def failures(self) -> list[DagsterEvent]:
        return [event for event in self.step_events if event.is_step_failure]


_MOVES_THE_PLAN = {DagsterEventType.STEP_OUTPUT, *_STEP_ENDS}


def past_of(records: Iterable[EventLogRecord]) -> Past:
    """Pure. The identities in `written` are those of each step's present try."""
    past = Past()
    for record in records:
        entry = record.event_log_entry
        event = entry.dagster_event
        if event is None:
            past.lines.add(entry.user_message)
            continue
        if event.event_type is DagsterEventType.RUN_START:
            past.started = True
        if event.event_type is DagsterEventType.LOGS_CAPTURED:
            for key in event.logs_captured_data.step_keys or ():
                past.written[key].add(identity(entry))
        if event.step_key is None or event.event_type in _PLANNED:
            past.lines.add(event.message or "")
            continue
        _add_step_event(past, entry, event, event.step_key)
    return past


_PLANNED = {
    DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED,
}


def _add_step_event(past: Past, entry: EventLogEntry, event: DagsterEvent, key: str) -> None:
    if event.event_type in _MOVES_THE_PLAN:
        past.step_events.append(event)
    if event.event_type in (DagsterEventType.STEP_START, DagsterEventType.STEP_RESTARTED):
        past.start_times[key] = entry.timestamp
    if event.event_type in _STEP_ENDS:
        past.begun.discard(key)
        past.written.pop(key, None)
        past.start_times.pop(key, None)
        if event.is_step_up_for_retry:
            past.retried_at[key] = entry.timestamp
        return
    past.written[key].add(identity(entry))
    if event.event_type is not DagsterEventType.ENGINE_EVENT:  # it may wait for a pool
        past.begun.add(key)


def read_past(instance: DagsterInstance, run_id: str) -> Past:
    """Reads a run's log, and completes its last event if its writer was killed half-way."""
    records: list[EventLogRecord] = []
    cursor: str | None = None
    while True:
        page = instance.get_records_for_run(run_id, cursor=cursor, limit=PAGE)
        records += page.records
        cursor = page.cursor
        if not page.has_more:
            break
    for record in _perhaps_torn(records[-NEWEST:]):
        complete_event(instance, record)
    return past_of(records)


def _perhaps_torn(newest: Sequence[EventLogRecord]) -> Iterator[EventLogRecord]:
    """Others write into a run's log too, so a torn event need not be its last; of its statuses only the last counts."""
    states = [r for r in newest if (e := r.event_log_entry.dagster_event) and e.is_job_event]
    for record in newest:
        event = record.event_log_entry.dagster_event
        if event is not None and (not event.is_job_event or record is states[-1]):
            yield record


def complete_last_event(instance: DagsterInstance, entry: EventLogEntry) -> bool:
    """Whether the entry is in the log already, though its writing was cut off; what is missing is then done."""
    newest = instance.get_records_for_run(entry.run_id, limit=NEWEST, ascending=False).records
    for record in newest:
        if _same(record.event_log_entry, entry):
            complete_event(instance, record)
            return True
    return False


def _same(one: EventLogEntry, other: EventLogEntry) -> bool:
    return (
        abs(one.timestamp - other.timestamp) < 1e-6
        and one.step_key == other.step_key
        and identity(one) == identity(other)
    )
