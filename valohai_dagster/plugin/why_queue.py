"""Why a run stays in Dagster's own queue, and why a step waits for a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dagster import DagsterRunStatus, RunsFilter

from valohai_dagster.executions.waiting import counted, lasting
from valohai_dagster.executions.why import Explanation
from valohai_dagster.plugin.queue_rules import QueueRule, rules_for

if TYPE_CHECKING:
    from datetime import datetime

    from dagster import DagsterInstance, DagsterRun

SHOWN = 5  # other runs that are named
# What Dagster's queue counts as in progress.
IN_PROGRESS = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]
DAEMON = "QUEUED_RUN_COORDINATOR"
DAEMON_SILENT_SECONDS = 120.0  # without a heartbeat for this long it is not running
NEXT_DAEMON = "start `dagster-daemon run -w workspace.yaml` (`make up` and `dagster dev` do it)"


def why_queued(instance: DagsterInstance, run: DagsterRun, now: datetime) -> Explanation:
    """Of a run with the status QUEUED."""
    active = instance.get_runs(RunsFilter(statuses=IN_PROGRESS))
    held = [
        text
        for rule in rules_for(run, instance.get_concurrency_config(), root_pools=True)
        if (text := _if_full(instance, rule, active)) is not None
    ]
    others = instance.get_runs_count(RunsFilter(statuses=[DagsterRunStatus.QUEUED])) - 1
    details = (f"{counted(others, 'other run')} in the queue",) if others > 0 else ()
    silent = _daemon_silence(instance, now)
    if silent is not None:
        return Explanation(
            state="no-daemon",
            text=f"in Dagster's run queue, and {silent}",
            next_step=NEXT_DAEMON,
            details=(*held, *details),
        )
    if held:
        return Explanation(
            state="limit",
            text=f"in Dagster's run queue: {held[0]}",
            next_step="wait until one of them has ended, or raise the limit",
            details=(*held[1:], *details),
        )
    return Explanation(
        state="queued",
        text="in Dagster's run queue; its daemon launches it at its next turn",
        details=details,
    )


def why_pool_waits(instance: DagsterInstance, pool: str, run_id: str, step_key: str) -> str | None:
    """Who has the pool's slots while this step waits for one; None when it has one, or could."""
    info = instance.event_log_storage.get_concurrency_info(pool)
    mine = (run_id, step_key)
    assigned = [s for s in info.pending_steps if s.assigned_timestamp is not None]
    holders = {(slot.run_id, slot.step_key) for slot in [*info.claimed_slots, *assigned]}
    if mine in holders or (info.limit is None and not info.slot_count):
        return None
    if len(holders) < info.slot_count:
        return None
    who = [f"{key} of run {run[:8]}" for run, key in sorted(holders)]
    waiting = sum(s.assigned_timestamp is None for s in info.pending_steps)
    text = f"pool {pool} is full: {len(holders)} of {counted(info.slot_count, 'slot')} held by {_few(who)}"
    return f"{text}, {counted(waiting, 'step')} waiting" if waiting > 1 else text


def _if_full(
    instance: DagsterInstance, rule: QueueRule, active: Sequence[DagsterRun]
) -> str | None:
    """The rule in words when it lets nobody in at this moment."""
    counted_runs = [run.run_id[:8] for run in active if rule.counts(run)]
    limit, text = rule.limit, rule.text
    if rule.kind == "pool":
        info = instance.event_log_storage.get_concurrency_info(rule.name)
        if info.limit is None and not info.slot_count:
            return None
        limit, text = info.slot_count, f"at most {info.slot_count} in pool {rule.name} at once"
        counted_runs = counted_runs or sorted(run[:8] for run in info.active_run_ids)
    if limit is None or len(counted_runs) < limit:
        return None
    verb = "is" if len(counted_runs) == 1 else "are"
    return f"{text}, and {len(counted_runs)} {verb} in progress ({_few(counted_runs)})"


def _daemon_silence(instance: DagsterInstance, now: datetime) -> str | None:
    beat = instance.get_daemon_heartbeats().get(DAEMON)
    if beat is None:
        return "no dagster-daemon has ever looked at it"
    silent = now.timestamp() - beat.timestamp
    if silent < DAEMON_SILENT_SECONDS:
        return None
    return f"no dagster-daemon has looked at it for {lasting(silent)}"


def _few(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    shown = ", ".join(names[:SHOWN])
    return f"{shown} and {counted(more, 'other')}" if more > 0 else shown or "nobody"
