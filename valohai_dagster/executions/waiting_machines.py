"""Why an execution waits in the queue of a group whose machines come and go, in words. Pure."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from valohai_agent.protocol import Worker, WorkerState
from valohai_dagster.executions.capacity_state import STATE_SECONDS, CapacityState
from valohai_dagster.executions.waiting import Wait, counted, explain_wait, queued, since

# States that those who wait are told of at once; of others only when they wait for long.
AT_ONCE = frozenset({"no-machine", "disabled"})


def explain_machines(
    group: str,
    workers: Collection[Worker],
    state: CapacityState | None,
    *,
    ahead: int,
    now: datetime,
) -> Wait:
    """`state`: how the group's machines stood at the last look, None when nobody has looked lately."""
    of_workers = explain_wait(group, workers, local=False, ahead=ahead)
    if of_workers.state in ("next", "version-mismatch"):
        return of_workers
    first = queued(group, ahead)
    if state is None:
        return Wait(
            state="nobody-looks",
            text=f"{first}: no conductor has looked after its machines for {STATE_SECONDS} s",
            next_step="`valohai-dagster doctor` checks the conductors",
        )
    if not state.enabled:
        return Wait(
            state="disabled",
            text=f"{first}, which is disabled: it gets no machines",
            next_step=f"`valohai-dagster groups enable {group}`, or choose another environment",
        )
    if state.starting:
        return _starting(first, state, now)
    if state.full:
        return _full(group, first, workers, state)
    if state.trouble is not None:
        return Wait(
            state="no-machine",
            text=f"{first}: no machine comes up: {state.trouble}",
            next_step=f"`valohai-dagster groups check {group}` looks at its settings; machines are asked for again by "
            "themselves",
        )
    why = f"{_slots(workers)}, and " if workers else ""
    return Wait(state="machine-wanted", text=f"{first}: {why}a machine is about to be asked for")


def _starting(first: str, state: CapacityState, now: datetime) -> Wait:
    which = "a machine starts" if state.starting == 1 else f"{state.starting} machines start"
    began = f" {since(state.starting_since, now)}" if state.starting_since else ""
    more = f"; more do not come: {state.trouble}" if state.trouble and not state.full else ""
    return Wait(state="machine-starting", text=f"{first}: {which}{began}{more}")


def _full(group: str, first: str, workers: Collection[Worker], state: CapacityState) -> Wait:
    most = counted(state.max_machines, "machine")
    if state.max_machines == 0:
        text = f"{first}, which may have no machine: its max_machines is 0"
    else:
        text = f"{first}: {_slots(workers)}, and it has all of its {most} (max_machines)"
    return Wait(
        state="at-maximum",
        text=text,
        next_step=f"wait for a free slot, or `valohai-dagster groups set {group} max_machines=NUMBER`",
    )


def _slots(workers: Collection[Worker]) -> str:
    serving = [one for one in workers if one.state is not WorkerState.draining]
    slots, busy = (
        sum(one.slots for one in serving),
        sum(min(one.busy, one.slots) for one in serving),
    )
    return f"{busy} of {slots} slots busy on {counted(len(serving), 'worker')}"
