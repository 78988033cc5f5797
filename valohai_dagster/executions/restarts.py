"""What follows an attempt that was cut short because its machine goes away (L-30 to L-32).

Where the command had not begun, the same execution gets another attempt. Else, with `autorestart`, another execution
continues it: the same step, code, values and input files, and beside them the input `_restart` with all outputs so
far. Both kinds go before everything that waits. Without `autorestart` it is an error.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from valohai_agent import protocol as p
from valohai_dagster.data import datums
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.resolve import ResolvedInputs, Source, resolve_inputs
from valohai_dagster.errors import RefusedError, ValohaiError
from valohai_dagster.executions import ledger
from valohai_dagster.executions.core import ServiceCore, queued_event
from valohai_dagster.executions.dispatch import QueueEntry
from valohai_dagster.executions.grants import GrantPlanner, job_of
from valohai_dagster.executions.lifecycle import MAX_RESTARTS, AfterReclaim, after_reclaim
from valohai_dagster.executions.memory import Active, Details, Metrics
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.stream import EventKind, FollowEvent
from valohai_dagster.executions.stream import ExecutionStatus as Status
from valohai_dagster.executions.trace_context import traceparent_of
from valohai_dagster.executions.writing import Writing
from valohai_dagster.records import tables as t

RESTART_INPUT = "_restart"


class Restarts:
    """On the records' thread, but for `queue`."""

    def __init__(self, core: ServiceCore, planner: GrantPlanner) -> None:
        self._core = core
        self._planner = planner

    def after_finish(
        self, writing: Writing, outbox: Outbox, active: Active, body: p.Finished
    ) -> bool:
        """The agent has stored what there was, and the records say that. Whether the execution has ended.

        `active`: as it was before.
        """
        why = body.reason or f"the machine of {active.worker} was taken away"
        began = any(span.phase == p.Phase.running.value for span in body.phases)
        return self._follow_up(writing, outbox, active, why, began=began)

    def after_loss(self, writing: Writing, outbox: Outbox, active: Active, why: str) -> None:
        """The machine went before its agent could tell the end; it ends here."""
        self._follow_up(writing, outbox, active, why, began=True)
        outbox.ended.append((active.group, active.id, active.attempt))

    async def queue(self, outbox: Outbox) -> None:
        """Queues what `outbox` says is to go before all; call it when all of that is written and told."""
        core = self._core
        entries = [
            QueueEntry(job=job, priority=priority, front=True, force=job.attempt > 1)
            for job, priority in outbox.front
        ]
        if not entries:
            return
        ranks = await core.patiently(lambda: core.dispatch.enqueue(*entries), "queueing")
        news = Outbox(queued={entry.job.group for entry in entries})
        for entry, ahead in zip(entries, ranks, strict=True):
            if ahead is not None:
                job = entry.job
                event = queued_event(job.group, ahead, job.attempt, core.clock())
                news.tell(job.execution_id, event)
        await core.deliver(news)

    def _follow_up(
        self, writing: Writing, outbox: Outbox, active: Active, why: str, *, began: bool
    ) -> bool:
        step = after_reclaim(
            began=began,
            autorestart=bool(writing.details(active.id).spec.get("autorestart")),
            restarts=active.restarts,
            attempt=active.attempt,
            max_attempts=self._core.settings.max_infrastructure_attempts,
        )
        if step is AfterReclaim.again:
            writing.update_attempt(active, active.attempt, end="preempted")
            outbox.ended.append((active.group, active.id, active.attempt))
            begin_again(writing, outbox, active, why)
            return False
        status, reason = Status.error, f"{why}. {self._advice(writing, active)}"
        if step is AfterReclaim.restart:
            try:
                counter = self._restart(writing, outbox, active, why)
                status, reason = Status.stopped, f"{why}; execution #{counter} continues it"
            except ValohaiError as error:
                reason = f"{why}; no other execution can continue it: {error}"
        writing.update(active, status=status.value, reason=reason, ended_at=writing.now)
        writing.change(writing.find(active.id) or active, status=status)
        return True

    def _advice(self, writing: Writing, active: Active) -> str:
        if writing.details(active.id).spec.get("autorestart"):
            return (
                f"It had been continued {MAX_RESTARTS} times already, which is the most: save more often, or run it "
                "in a group without spot machines."
            )
        return (
            "With `autorestart: true` in its step, or at launch, another execution would continue it with these "
            "outputs in the input `_restart`."
        )

    # -- the execution that goes on --------------------------------------------------------------------------------
    def _restart(self, writing: Writing, outbox: Outbox, active: Active, why: str) -> int:
        """Its counter. Raises `ValohaiError` before anything is written."""
        details = writing.details(active.id)
        writing.touch(active)
        writing.flush()
        row = ledger.row_of(writing.conn, active.id)
        before = job_of(details, active)
        kept = self._kept(writing, before, active, details.project_id)
        counter = ledger.take_counters(writing.conn, details.project_id, 1)
        execution_id = str(uuid.uuid5(uuid.UUID(active.id), "restart"))
        job = _job(before, execution_id, counter, writing, row, kept)
        sources = {
            k: v
            for k, v in self._planner.open_sources(details).items()
            if not k.startswith(f"{RESTART_INPUT}.")
        }
        sealed = self._planner.seal_sources({**sources, **kept.sources})
        new = replace(
            active,
            id=execution_id,
            status=Status.queued,
            attempt=1,
            token=None,
            worker=None,
            last_seq=0,
            suspected_at=None,
            reclaimed_at=None,
            restarts=active.restarts + 1,
        )
        values = _row(row, new, job, sealed, counter, writing)
        writing.insert(new, t.executions, values)
        writing.insert(new, t.attempts, {"execution_id": execution_id, "number": 1})
        if inputs := _inputs(writing, active, job, kept):
            writing.insert(new, t.execution_inputs, *inputs)
        writing.flush()
        known = {name: values[name] for name in ("id", "project_id", "image", "spec", "job")}
        writing.keep_details(Details(**known, sources=sealed))
        writing.keep_metrics(execution_id, Metrics())
        writing.change(new)
        outbox.front.append((job, new.priority))
        outbox.tell(execution_id, _state(writing, new, job.notices[-1]))
        return counter

    def _kept(
        self, writing: Writing, job: p.Job, active: Active, project_id: str
    ) -> ResolvedInputs:
        """The outputs so far, and those that it began with itself, unless it has stored one of the same name."""
        c = t.datums.c
        files = [f for i in job.inputs if i.name == RESTART_INPUT for f in i.files]
        earlier = [file.datum_id for file in files if file.datum_id is not None]
        query = sa.select(c.id).where(
            c.execution_id == active.id, c.withdrawn.is_(False), c.purged.is_(False)
        )
        own = writing.conn.execute(query.order_by(c.ctime, c.id)).scalars()
        known = datums.find_datums(writing.conn, earlier).values()
        before = sorted((datum.ctime, datum.id) for datum in known if not datum.purged)
        ids = [*(datum_id for _, datum_id in before), *own]
        datums.hold(writing.conn, ids)
        group = self._core.settings.groups.get(active.group)
        if group is None:
            raise RefusedError(f"the worker group {active.group!r} is not in the settings any more")
        uris = [f"{datums.SCHEME}{datum_id}" for datum_id in ids]
        wanted = InputSpec(name=RESTART_INPUT, uris=uris, optional=True, keep_directories="full")
        found = resolve_inputs(
            [wanted],
            connection=writing.conn,
            stores=self._core.stores,
            group=group,
            project_id=project_id,
        )
        return _renamed(found)


def begin_again(writing: Writing, outbox: Outbox, active: Active, why: str) -> None:
    """Another attempt of the same execution, before everything that waits."""
    writing.touch(active, t.datums).execute(
        # What the lost attempt has reported is no output of the execution any more: the next one reports it anew. Its
        # files stay datums that this execution made, since somebody may use them already, by an alias or live.
        t.datums.update().where(t.datums.c.execution_id == active.id).values(withdrawn=True)
    )
    writing.keep_metrics(active.id, Metrics(count=writing.metrics(active.id).count))
    number, status = active.attempt + 1, Status.queued
    writing.insert(active, t.attempts, {"execution_id": active.id, "number": number})
    ended = dict.fromkeys(("reason", "exit_code", "ended_at", "usage"))
    values = {"attempt": number, "status": status.value, "cumulative_metadata": {}, "phases": []}
    writing.update(active, **values, **ended)
    current = writing.change(
        active,
        attempt=number,
        status=status,
        token=None,
        worker=None,
        last_seq=0,
        suspected_at=None,
        reclaimed_at=None,
    )
    outbox.tell(active.id, _state(writing, current, f"starting attempt {number}: {why}"))
    job = job_of(writing.details(active.id), current)
    outbox.front.append((job, current.priority))


def _renamed(found: ResolvedInputs) -> ResolvedInputs:
    """With ids that no other input's files have."""
    names = {file_id: f"{RESTART_INPUT}.{file_id}" for file_id in found.sources}
    inputs = [
        item.model_copy(
            update={"files": [f.model_copy(update={"id": names[f.id]}) for f in item.files]}
        )
        for item in found.inputs
    ]
    sources: dict[str, Source] = {names[k]: v for k, v in found.sources.items()}
    asked = {names[k]: v for k, v in found.asked.items()}
    return replace(found, inputs=inputs, sources=sources, asked=asked)


def _job(
    before: p.Job,
    execution_id: str,
    counter: int,
    writing: Writing,
    row: Any,
    kept: ResolvedInputs,
) -> p.Job:
    """L-32: parameters and input files are those of the interrupted execution."""
    number = sum(len(item.files) for item in kept.inputs)
    notice = (
        f"continues execution #{row.counter} ({row.id}), whose machine was reclaimed: {number} "
        f"{'file' if number == 1 else 'files'} in the input {RESTART_INPUT}"
    )
    config = {
        **before.execution_config,
        "valohai.execution-id": execution_id,
        "valohai.execution-counter": counter,
        "valohai.execution-ctime": writing.now.isoformat(),
    }
    trace = {"traceparent": traceparent_of(before.run_id, execution_id)} if before.trace else {}
    return before.model_copy(
        update={
            "execution_id": execution_id,
            "attempt": 1,
            "inputs": [*(i for i in before.inputs if i.name != RESTART_INPUT), *kept.inputs],
            "execution_config": config,
            "notices": [*before.notices, notice],
            "trace": trace,
        }
    )


def _row(
    row: Any, new: Active, job: p.Job, sources: bytes, counter: int, writing: Writing
) -> dict[str, Any]:
    """Who asked for it, title and tags are those of the interrupted execution; what it did is not."""
    unknown = ("status_detail", "reason", "exit_code", "interpolated_command", "started_at")
    return {
        **row._mapping,
        **dict.fromkeys((*unknown, "ended_at", "usage", "price")),
        "id": new.id,
        "counter": counter,
        "spec": {**row.spec, "execution_id": new.id},
        "job": job.model_dump(mode="json"),
        "sources": sources,
        "status": Status.queued.value,
        "attempt": 1,
        "cumulative_metadata": {},
        "stop_requested": 0,
        "ctime": writing.now,
        "qtime": writing.now,
        "phases": [],
        "warnings": [],
        "restart_of": row.id,
        "restarts": new.restarts,
    }


def _inputs(
    writing: Writing, active: Active, job: p.Job, kept: ResolvedInputs
) -> list[dict[str, Any]]:
    """The files of the interrupted execution with what is known of them, and its outputs."""
    c = t.execution_inputs.c
    theirs = sa.and_(c.execution_id == active.id, c.input != RESTART_INPUT)
    rows = writing.conn.execute(sa.select(t.execution_inputs).where(theirs)).mappings()
    same = [{**row, "execution_id": job.execution_id, "cached": None} for row in rows]
    of_restart = job.model_copy(update={"inputs": kept.inputs})
    return [*same, *ledger.input_rows(of_restart, kept.asked)]


def _state(writing: Writing, active: Active, text: str) -> FollowEvent:
    return FollowEvent(kind=EventKind.state, time=writing.now, attempt=active.attempt, message=text)
