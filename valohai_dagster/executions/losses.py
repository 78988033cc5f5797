"""What happens to an execution whose worker is lost (the protocol's table of losses)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from valohai_dagster.executions import ledger
from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.executions.lifecycle import Loss, LossStep, judge_loss
from valohai_dagster.executions.memory import Active
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.restarts import Restarts, begin_again
from valohai_dagster.executions.salvage import Supervisor, recorded, salvage
from valohai_dagster.executions.stops import add_final, end
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, FollowEvent
from valohai_dagster.executions.writing import Writing


class Losses:
    def __init__(
        self, core: ServiceCore, groups: Mapping[str, Supervisor], restarts: Restarts
    ) -> None:
        self._core = core
        self._restarts = restarts
        self._groups = groups
        self._handling: set[str] = set()

    async def handle(self, active: Active, *, death_confirmed: bool, what: str) -> None:
        """A loss that is being handled, or was by the time it is told here, is not handled again."""
        if active.id in self._handling or not self._is_current(active):
            return
        self._handling.add(active.id)
        try:
            await self._handle(active, death_confirmed=death_confirmed, what=what)
        finally:
            self._handling.discard(active.id)

    def _is_current(self, active: Active) -> bool:
        current = self._core.memory.active.get(active.id)
        return current is not None and current.attempt == active.attempt

    async def _handle(self, active: Active, *, death_confirmed: bool, what: str) -> None:
        settings = self._core.settings
        loss = Loss(
            suspected_at=active.suspected_at,
            death_confirmed=death_confirmed,
            stop_requested=active.stop_requested > 0,
            attempt=active.attempt,
            reclaimed_at=active.reclaimed_at,
        )
        step = judge_loss(
            loss,
            self._core.clock(),
            grace=timedelta(seconds=settings.lost_grace_seconds),
            max_attempts=settings.max_infrastructure_attempts,
        )
        why = f"worker {active.worker} was lost: {what}"
        if step is LossStep.suspect:
            await self._suspect(active)
        elif step is LossStep.requeue:
            await self.requeue(active, why)
        elif step is LossStep.reclaimed:
            text = f"the machine of worker {active.worker} was reclaimed before the command ended: {what}"
            await self._reclaimed(active, text)
        elif step in (LossStep.stopped, LossStep.give_up):
            await self._finish(active, why, stopped=step is LossStep.stopped)

    async def _suspect(self, active: Active) -> None:
        text = (
            f"no sign of life from worker {active.worker}; it may still be computing, "
            f"another attempt starts in {self._core.settings.lost_grace_seconds:.0f} s if it stays silent"
        )
        await self._mark(active, suspected=True, kind=EventKind.warning, text=text)

    async def back(self, active: Active) -> None:
        text = f"worker {active.worker} is back, the attempt goes on"
        await self._mark(active, suspected=False, kind=EventKind.state, text=text)

    async def _mark(self, active: Active, *, suspected: bool, kind: EventKind, text: str) -> None:
        def change(writing: Writing) -> Outbox:
            outbox = Outbox()
            current = _same_attempt(writing, active)
            if current is not None and (current.suspected_at is None) is suspected:
                since = writing.now if suspected else None
                writing.update_attempt(current, current.attempt, suspected_at=since)
                writing.change(current, suspected_at=since)
                outbox.tell(active.id, _event(writing, current, text, kind))
            return outbox

        await self._core.deliver(await self._core.transact(change))

    async def requeue(self, active: Active, why: str) -> None:
        """Another attempt after an infrastructure loss, ahead of everything that waits."""
        logs = await self._salvage(active)

        def change(writing: Writing) -> Outbox:
            outbox = Outbox()
            current = _same_attempt(writing, active)
            if current is not None:
                _end_attempt(writing, current, why, logs)
                begin_again(writing, outbox, current, why)
            return outbox

        async with self._core.admission:
            outbox = await self._core.transact(change)
            await self._core.deliver(outbox)
            await self._restarts.queue(outbox)

    async def _reclaimed(self, active: Active, why: str) -> None:
        """Its cloud had announced to take the machine away, and nothing more was heard of it (L-30)."""
        logs = await self._salvage(active)

        def change(writing: Writing) -> Outbox:
            outbox = Outbox()
            current = _same_attempt(writing, active)
            if current is not None:
                _end_attempt(writing, current, why, logs, how="preempted")
                self._restarts.after_loss(writing, outbox, current, why)
                add_final(writing, outbox, [active.id], self._core)
            return outbox

        async with self._core.admission:
            outbox = await self._core.transact(change)
            await self._core.deliver(outbox)
            await self._restarts.queue(outbox)

    async def _finish(self, active: Active, why: str, *, stopped: bool) -> None:
        logs = await self._salvage(active)

        def change(writing: Writing) -> Outbox:
            outbox = Outbox()
            current = _same_attempt(writing, active)
            if current is None:
                return outbox
            _end_attempt(writing, current, why, logs)
            status, reason = ExecutionStatus.stopped, f"stopped; {why}"
            if not stopped:
                writing.flush()
                attempts = ledger.attempt_reasons(writing.conn, active.id)
                lines = "; ".join(f"attempt {number}: {reason}" for number, reason in attempts)
                status = ExecutionStatus.crashed
                reason = f"lost {current.attempt} times: {lines or why}"
            end(writing, outbox, current, status, reason)
            add_final(writing, outbox, [active.id], self._core)
            return outbox

        await self._core.deliver(await self._core.transact(change))

    async def _salvage(self, active: Active) -> dict[str, Any]:
        found = await salvage(
            self._core,
            self._groups,
            group=active.group,
            execution_id=active.id,
            attempt=active.attempt,
        )
        return found or {}


def _same_attempt(writing: Writing, active: Active) -> Active | None:
    """The execution as it is now, provided that the lost attempt is still its present one."""
    current = writing.find(active.id)
    if current is None or current.status.final or current.attempt != active.attempt:
        return None
    return current


def _end_attempt(
    writing: Writing, active: Active, why: str, logs: dict[str, Any], *, how: str = "lost"
) -> None:
    """Closes the lost attempt; what its log says is kept."""
    kept = recorded(writing.touch(active), logs) if logs else {}
    values = {"ended_at": writing.now, "end": how, "reason": why, "logs": kept}
    writing.update_attempt(active, active.attempt, **values)


def _event(writing: Writing, active: Active, text: str, kind: EventKind) -> FollowEvent:
    return FollowEvent(kind=kind, time=writing.now, attempt=active.attempt, message=text)
