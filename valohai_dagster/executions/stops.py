"""Stop requests (K-54, L-20) and stop conditions (M-40)."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from valohai_agent import protocol as p
from valohai_dagster.data.version_effects import Settled
from valohai_dagster.executions.conditions import ConditionError, is_met
from valohai_dagster.executions.core import ServiceCore, standing_event
from valohai_dagster.executions.lifecycle import status_after_stop
from valohai_dagster.executions.memory import Active
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.pricing import write_prices
from valohai_dagster.executions.remarks import settle_versions_of
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, FollowEvent
from valohai_dagster.executions.submissions import Submission
from valohai_dagster.executions.views import continued_by, views_of
from valohai_dagster.executions.writing import Writing

log = logging.getLogger(__name__)


class Stops:
    def __init__(self, core: ServiceCore) -> None:
        self._core = core

    async def stop(self, execution_id: str, *, hard: bool, reason: str) -> None:
        """Idempotent; a second request is a hard stop. Each hop is told to the followers."""
        core = self._core
        active = await core.patiently(lambda: core.find(execution_id), "stopping")
        if active is None:
            log.warning("stop of unknown execution %s", execution_id, extra={"action": "stop"})
        elif active.status.final:
            await self._stop_continuation(execution_id, hard=hard, reason=reason)
        elif active.shard not in core.memory.fences:
            await self._pass_on(active, hard=hard, reason=reason)
        else:
            async with core.admission:  # nobody is just queueing it
                outbox = await core.patiently(
                    lambda: self._stop(execution_id, hard=hard, reason=reason), "stopping"
                )
            if outbox is None:
                await self._stop_continuation(execution_id, hard=hard, reason=reason)
            else:
                await core.deliver(outbox)

    async def _stop_continuation(self, execution_id: str, *, hard: bool, reason: str) -> None:
        """Who asks may not know yet that another execution continues it (L-32)."""
        core, this = self._core, [execution_id]
        following = await core.patiently(
            lambda: core.read(lambda conn: continued_by(conn, this)), "stopping"
        )
        if execution_id in following:
            await self.stop(following[execution_id], hard=hard, reason=reason)
        else:
            await core.patiently(lambda: core.snapshot(execution_id), "stopping")

    async def _pass_on(self, active: Active, *, hard: bool, reason: str) -> None:
        """To the conductor that looks after it."""
        stop = Submission(kind="stop", execution_id=active.id, hard=hard, reason=reason)
        stream = self._core.keys.submissions(active.shard)
        await self._core.deliver(Outbox(posts=[(stream, {"s": stop.model_dump_json()})]))

    async def _stop(self, execution_id: str, *, hard: bool, reason: str) -> Outbox | None:
        """None when it has ended, or has gone to another conductor, in this moment."""
        core = self._core
        active = core.memory.active.get(execution_id)
        if active is None:
            return None
        withdrawn = active.status is ExecutionStatus.created or (
            active.token is None and await core.dispatch.withdraw(active.group, active.id)
        )

        def change(writing: Writing) -> Outbox:
            outbox = Outbox()
            current = writing.find(execution_id)
            if current is None or current.status.final:
                return outbox
            if withdrawn and current.token is None:
                why = reason or "stopped before it started"
                end(writing, outbox, current, ExecutionStatus.stopped, why)
                add_final(writing, outbox, [execution_id], core)
            else:
                request_stop(writing, outbox, current, hard=hard, reason=reason)
            return outbox

        return await core.transact(change)


def end(
    writing: Writing, outbox: Outbox, active: Active, status: ExecutionStatus, reason: str
) -> None:
    """Ends an execution that no agent will report on any more; `add_final` tells of it."""
    writing.update(active, status=status.value, reason=reason, ended_at=writing.now)
    writing.change(active, status=status)
    outbox.ended.append((active.group, active.id, active.attempt))


def add_final(
    writing: Writing,
    outbox: Outbox,
    execution_ids: Collection[str],
    core: ServiceCore,
    *,
    reported_at: Mapping[str, datetime] | None = None,
) -> None:
    """The last word on executions that have ended. `reported_at`: when their agents said so."""
    if not execution_ids:
        return
    writing.flush()
    for execution_id, settled in settle_versions_of(writing, execution_ids).items():
        outbox.tell(execution_id, *_settled(writing, execution_id, settled))
    writing.flush()
    write_prices(writing.conn, execution_ids, core.settings.groups)
    views = views_of(writing.conn, list(execution_ids), datum_url=core.settings.datum_url)
    reported = reported_at or {}
    for execution_id, view in views.items():
        event = standing_event(view, writing.now)
        event = event.model_copy(update={"reported_at": reported.get(execution_id)})
        outbox.tell(execution_id, event)
        outbox.stops_answered.append(execution_id)


def _settled(writing: Writing, execution_id: str, settled: Settled) -> list[FollowEvent]:
    active = writing.find(execution_id)
    attempt = active.attempt if active else 1
    told = [(EventKind.state, text) for text in settled.made]
    told += [(EventKind.warning, text) for text in settled.warnings]
    return [
        FollowEvent(kind=kind, time=writing.now, attempt=attempt, message=text)
        for kind, text in told
    ]


def request_stop(
    writing: Writing, outbox: Outbox, active: Active, *, hard: bool, reason: str
) -> None:
    """A stop of work in progress, written down and passed on to the worker if there is one."""
    hard = hard or active.stop_requested > 0
    status = status_after_stop(active.status, hard=hard)
    level = 2 if hard else 1
    writing.update(active, status=status.value, stop_requested=level, reason=reason or None)
    active = writing.change(active, status=status, stop_requested=level, stop_reason=reason or None)
    word = "hard stop" if hard else "stop"
    text = f"{word} requested{': ' + reason if reason else ''}"
    outbox.tell(active.id, _state(writing, active, text, status=status.value))
    forward_stop(writing, outbox, active)


def forward_stop(writing: Writing, outbox: Outbox, active: Active) -> None:
    """Tells the worker, if one has the lease and a stop was requested."""
    if active.worker is None or active.token is None or not active.stop_requested:
        return
    kind = "stop-hard" if active.stop_requested > 1 else "stop"
    command = p.Command(
        kind=kind, execution_id=active.id, token=active.token, reason=active.stop_reason or ""
    )
    outbox.commands.append((active.group, active.worker, command))
    outbox.stops_sent.append(active.id)
    outbox.tell(active.id, _state(writing, active, f"{kind} sent to worker {active.worker}"))


class StopConditions:
    """On the records' thread."""

    def __init__(self) -> None:
        self._warned: dict[str, set[str]] = {}

    def check(
        self, writing: Writing, outbox: Outbox, active: Active, events: Sequence[dict[str, Any]]
    ) -> None:
        """M-40: stops the execution gracefully as soon as one of its metadata events satisfies the condition."""
        condition = active.condition
        if active.stop_requested or condition is None:
            return
        latest = writing.metrics(active.id).latest
        parameters = writing.details(active.id).job["parameters"]
        try:
            met = any(
                is_met(condition, metadata={**latest, **event}, parameters=parameters)
                for event in events
            )
        except ConditionError as error:
            self._warn_once(writing, outbox, active, f"stop-condition {condition!r}: {error}")
            return
        if met:
            reason = f"stop-condition met: {condition}"
            request_stop(writing, outbox, active, hard=False, reason=reason)

    def forget(self, execution_id: str) -> None:
        self._warned.pop(execution_id, None)

    def _warn_once(self, writing: Writing, outbox: Outbox, active: Active, text: str) -> None:
        warned = self._warned.setdefault(active.id, set())
        if text not in warned:
            warned.add(text)
            event = FollowEvent(
                kind=EventKind.warning, time=writing.now, attempt=active.attempt, message=text
            )
            outbox.tell(active.id, event)


def _state(writing: Writing, active: Active, text: str, **data: Any) -> FollowEvent:
    return FollowEvent(
        kind=EventKind.state,
        time=writing.now,
        attempt=active.attempt,
        message=text,
        data=data,
    )
