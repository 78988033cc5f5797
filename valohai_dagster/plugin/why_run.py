"""What a run waits for or does right now, step by step: Dagster's facts, and under them those of its executions.

Used by `valohai-dagster why` and by the launcher for Dagster's run monitoring. Everything here only reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import redis
import sqlalchemy as sa
from dagster import DagsterEventType, DagsterRunStatus

from valohai_agent.protocol import utcnow
from valohai_dagster.executions.waiting import counted, lasting
from valohai_dagster.executions.why import NEXT_CONDUCTOR, NEXT_DOCTOR, Explanation
from valohai_dagster.executions.why_reader import Sources, conductor_of, why_execution
from valohai_dagster.plugin.compat import GLOBAL_CONCURRENCY_TAG
from valohai_dagster.plugin.engine_choice import why_not_driven
from valohai_dagster.plugin.why_queue import why_pool_waits, why_queued
from valohai_dagster.records import tables as t

if TYPE_CHECKING:
    from dagster import DagsterInstance, DagsterRun

    from valohai_dagster.plugin.compat import DagsterEvent, ExecutionPlanSnapshot

SHOWN = 20  # steps that are explained one by one
_STEP_ENDS = {
    DagsterEventType.STEP_SUCCESS: "succeeded",
    DagsterEventType.STEP_FAILURE: "failed",
    DagsterEventType.STEP_SKIPPED: "skipped",
}
_RUN_ERRORS = {DagsterEventType.ENGINE_EVENT, DagsterEventType.RUN_FAILURE}
_STEP_EVENTS = {
    *_STEP_ENDS,
    DagsterEventType.STEP_START,
    DagsterEventType.STEP_RESTARTED,
    DagsterEventType.STEP_UP_FOR_RETRY,
}


@dataclass(frozen=True, kw_only=True)
class RunExplanation:
    """`run` says it in one line, `steps` explain those that have not ended, or that failed."""

    run: Explanation
    steps: tuple[Explanation, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        yield from self.run.lines()
        for step in self.steps:
            yield from (f"  {line}" for line in step.lines())

    def to_dict(self) -> dict[str, Any]:
        return {**self.run.to_dict(), "steps": [step.to_dict() for step in self.steps]}


def why_run(
    instance: DagsterInstance,
    run: DagsterRun,
    sources: Sources | None,
    *,
    now: datetime | None = None,
) -> RunExplanation:
    """`sources` is None when the records cannot be opened; then only Dagster's own facts are told."""
    now = now or utcnow()
    found = _Run(instance, run, sources, now).explain()
    facts = {"run": run.run_id, "job": run.job_name, "status": run.status.value}
    named = Explanation(
        subject=f"run {run.run_id[:8]}",
        state=found.run.state,
        text=found.run.text,
        next_step=found.run.next_step,
        details=found.run.details,
        facts={**found.run.facts, **facts},
    )
    return RunExplanation(run=named, steps=found.steps)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One step of the plan and what the event log says of it."""

    key: str
    pool: str | None
    upstream: frozenset[str]
    last: DagsterEvent | None
    at: datetime | None

    @property
    def ended(self) -> str | None:
        return _STEP_ENDS.get(self.last.event_type) if self.last is not None else None


class _Run:
    def __init__(
        self, instance: DagsterInstance, run: DagsterRun, sources: Sources | None, now: datetime
    ) -> None:
        self._instance, self._run, self._sources, self._now = instance, run, sources, now

    def explain(self) -> RunExplanation:
        run = self._run
        if run.status is DagsterRunStatus.NOT_STARTED:
            text = "created, and not submitted by whoever made it"
            return RunExplanation(run=Explanation(state="not-submitted", text=text))
        if run.status is DagsterRunStatus.QUEUED:
            return RunExplanation(run=self._with_engine(why_queued(self._instance, run, self._now)))
        steps = self._steps()
        told = tuple(self._explain_steps(steps))
        if run.is_finished:
            failed = any(step.ended == "failed" for step in steps)
            return RunExplanation(run=self._finished(failed), steps=told)
        return RunExplanation(run=self._in_progress(steps, told), steps=told)

    # -- the run itself ---------------------------------------------------------------------------------------------

    def _finished(self, a_step_failed: bool) -> Explanation:
        run = self._run
        record = self._instance.get_run_record_by_id(run.run_id)
        took = ""
        if record is not None and record.start_time and record.end_time:
            took = f" after {lasting(record.end_time - record.start_time)}"
        words = {"SUCCESS": "succeeded", "FAILURE": "failed", "CANCELED": "was cancelled"}
        text, state = f"{words.get(run.status.value, run.status.value)}{took}", run.status.value
        if run.status is not DagsterRunStatus.FAILURE or a_step_failed:
            return Explanation(state=state.lower(), text=text)
        first, *more = self._last_error().splitlines() or [""]
        return Explanation(
            state=state.lower(),
            text=f"{text}: {first}" if first else text,
            next_step=NEXT_DOCTOR,
            details=tuple(more),
        )

    def _last_error(self) -> str:
        """What ended a run of which no step failed, such as a launch that found no conductor."""
        text = ""
        for entry in self._instance.all_logs(self._run.run_id, of_type=_RUN_ERRORS):
            data = entry.dagster_event and entry.dagster_event.event_specific_data
            error = getattr(data, "error", None)
            if error is not None:
                kind, _, words = error.message.strip().partition(": ")
                named = bool(error.cls_name) and kind.endswith(error.cls_name)
                text = words if named else error.message.strip()
        return text

    def _in_progress(self, steps: Sequence[_Step], told: Sequence[Explanation]) -> Explanation:
        reason = why_not_driven(self._instance, self._run)
        absent = self._no_driver() if reason is None else None
        if absent is not None:
            return absent
        doing = "is being cancelled" if self._run.status is DagsterRunStatus.CANCELING else ""
        if not doing and self._run.status is DagsterRunStatus.STARTING:
            doing = "is being launched"
        ended = Counter(step.ended for step in steps if step.ended)
        left = len(steps) - sum(ended.values())
        counts = [f"{number} {word}" for word, number in sorted(ended.items())]
        progress = f"{left} of {counted(len(steps), 'step')} left"
        text = ", ".join(part for part in (doing, progress, *counts) if part)
        state = told[0].state if len(steps) == 1 and told else "in-progress"
        return self._with_engine(Explanation(state=state, text=text))

    def _with_engine(self, found: Explanation) -> Explanation:
        """Adds why Dagster's own engine runs it, if it does."""
        reason = why_not_driven(self._instance, self._run)
        if reason is None:
            return found
        details = (*found.details, f"Dagster's own engine runs it: {reason}")
        return Explanation(
            state=found.state, text=found.text, next_step=found.next_step, details=details
        )

    def _no_driver(self) -> Explanation | None:
        """When no conductor drives a run that only a conductor can drive."""
        sources = self._sources
        if sources is None:
            return None
        with sources.records.read() as conn:
            query = sa.select(t.runs.c.shard).where(t.runs.c.run_id == self._run.run_id)
            shard = conn.execute(query).scalar_one_or_none()
        if shard is None and self._run.status is not DagsterRunStatus.STARTING:
            return (
                None  # driven by the process that has begun it, such as `dagster asset materialize`
            )
        if shard is None:
            text = "it was not handed over to a conductor (yet)"
            hint = "if that lasts, the process that launched it has died: launch it again"
            return Explanation(state="not-handed-over", text=text, next_step=hint)
        if sources.broker is None:
            return None
        try:
            conductor = conductor_of(sources.broker, sources.keys, shard)
        except redis.RedisError as error:
            hint = "`valohai-dagster doctor` checks it; the run goes on when it is back"
            return Explanation(state="no-redis", text=f"Redis is away ({error})", next_step=hint)
        if conductor == "nobody":
            text = "handed over, and no conductor is running; what its workers do goes on"
            return Explanation(state="no-conductor", text=text, next_step=NEXT_CONDUCTOR)
        return None

    # -- its steps --------------------------------------------------------------------------------------------------

    def _steps(self) -> list[_Step]:
        plan_id = self._run.execution_plan_snapshot_id
        plan = self._instance.get_execution_plan_snapshot(plan_id) if plan_id else None
        if plan is None:
            return []
        last: dict[str, tuple[DagsterEvent, datetime]] = {}
        for entry in self._instance.all_logs(self._run.run_id, of_type=_STEP_EVENTS):
            event = entry.dagster_event
            if event is not None and event.step_key is not None:
                last[event.step_key] = event, datetime.fromtimestamp(entry.timestamp, timezone.utc)
        return list(_steps_of(plan, last))

    def _explain_steps(self, steps: Sequence[_Step]) -> Iterator[Explanation]:
        executions = self._executions()
        by_key = {step.key: step for step in steps}
        interesting = [s for s in steps if s.ended is None or s.ended == "failed"]
        if self._run.is_finished:
            interesting = [s for s in interesting if s.last is not None]
        interesting.sort(
            key=lambda s: bool(_open_upstream(s, by_key))
        )  # what others wait for first
        for step in interesting[:SHOWN]:
            yield self._explain_step(step, by_key, executions.get(step.key))
        if len(interesting) > SHOWN:
            text = f"{len(interesting) - SHOWN} more steps"
            yield Explanation(state="more", text=text)

    def _explain_step(
        self, step: _Step, steps: Mapping[str, _Step], execution_id: str | None
    ) -> Explanation:
        subject = f"step {step.key}"
        facts = {"step": step.key}
        waits = None if step.ended else self._why_step_waits(step, steps, execution_id)
        if waits is not None:
            return Explanation(subject=subject, state=waits[0], text=waits[1], facts=facts)
        if execution_id is None or self._sources is None:
            word = step.ended or ("running" if step.last is not None else "about to begin")
            return Explanation(
                subject=subject, state=word.replace(" ", "-"), text=word, facts=facts
            )
        found = why_execution(self._sources, execution_id, now=self._now)
        return Explanation(
            subject=f"{subject} ({found.subject})",
            state=found.state,
            text=found.text,
            next_step=found.next_step,
            details=found.details,
            facts={**found.facts, **facts},
        )

    def _why_step_waits(
        self, step: _Step, steps: Mapping[str, _Step], execution_id: str | None
    ) -> tuple[str, str] | None:
        """State and words of a step that has not begun, or not begun again; None when it has."""
        if step.last is not None and step.last.event_type is DagsterEventType.STEP_UP_FOR_RETRY:
            return self._retry(step)
        if step.last is not None or execution_id is not None:
            return None
        if open_ones := _open_upstream(step, steps):
            names = ", ".join(open_ones[:5]) + (" and others" if len(open_ones) > 5 else "")
            return "upstream", f"waits for {names}"
        if step.pool is not None:
            full = why_pool_waits(self._instance, step.pool, self._run.run_id, step.key)
            return ("pool", f"waits for a slot: {full}") if full else None
        return None

    def _retry(self, step: _Step) -> tuple[str, str] | None:
        assert step.last is not None
        assert step.at is not None
        seconds = float(step.last.step_retry_data.seconds_to_wait or 0)
        due = step.at + timedelta(seconds=seconds)
        left = (due - self._now).total_seconds()
        if left <= 0:
            return None
        return (
            "retry",
            f"its try failed, the next one begins at {due:%H:%M:%S} UTC (in {lasting(left)})",
        )

    def _executions(self) -> dict[str, str]:
        """Step key -> the execution of its latest try."""
        if self._sources is None:
            return {}
        e = t.executions.c
        query = (
            sa.select(e.step_key, e.id)
            .where(e.run_id == self._run.run_id, e.step_key.is_not(None))
            .order_by(e.retry_number, e.ctime)
        )
        with self._sources.records.read() as conn:
            return {row.step_key: row.id for row in conn.execute(query)}


def _open_upstream(step: _Step, steps: Mapping[str, _Step]) -> list[str]:
    return sorted(key for key in step.upstream if key in steps and not steps[key].ended)


def _steps_of(
    plan: ExecutionPlanSnapshot, last: Mapping[str, tuple[DagsterEvent, datetime]]
) -> Iterator[_Step]:
    selected = set(plan.step_keys_to_execute)
    for step in plan.steps:
        if step.key in selected:
            event, at = last.get(step.key, (None, None))
            upstream = {key for item in step.inputs for key in item.upstream_step_keys}
            pool = step.pool or (step.tags or {}).get(GLOBAL_CONCURRENCY_TAG)
            yield _Step(
                key=step.key,
                pool=pool,
                upstream=frozenset(upstream & selected),
                last=event,
                at=at,
            )
