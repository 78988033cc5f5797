"""Why an execution waits in a queue, in words. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from valohai_agent.protocol import PROTOCOL_VERSION, Worker, WorkerState


@dataclass(frozen=True, kw_only=True)
class Wait:
    """`state` is one word for programs, `text` one line for people."""

    state: str
    text: str
    next_step: str | None = None

    def __str__(self) -> str:
        return self.text if self.next_step is None else f"{self.text}; {self.next_step}"


def why_it_waits(group: str, workers: Collection[Worker], *, local: bool, ahead: int) -> str:
    """One line for somebody whose execution stays in the queue of `group`, with the next step where there is one."""
    return str(explain_wait(group, workers, local=local, ahead=ahead))


def explain_wait(
    group: str,
    workers: Collection[Worker],
    *,
    local: bool,
    ahead: int,
    max_agents: int | None = None,
) -> Wait:
    """`local`: the conductor starts the group's agents itself, at most `max_agents` of them."""
    if not workers:
        return _nobody(group, local=local, max_agents=max_agents)
    able = [w for w in workers if w.protocol_min <= PROTOCOL_VERSION <= w.protocol]
    if not able:
        return _other_version(group, workers)
    serving = [w for w in able if w.state is not WorkerState.draining]
    if not serving:
        return _draining(group, len(able), ahead, local=local)
    slots, busy = sum(w.slots for w in serving), sum(min(w.busy, w.slots) for w in serving)
    if busy < slots and ahead < slots - busy:
        return Wait(
            state="next", text=f"{queued(group, ahead)}; a worker with a free slot takes it"
        )
    text = (
        f"{queued(group, ahead)}: {busy} of {slots} slots busy on {counted(len(serving), 'worker')}"
    )
    more = "raise max_agents or slots of the group in valohai.toml" if local else _start(group)
    return Wait(state="busy", text=text, next_step=f"wait for a free slot, or {more}")


def queued(group: str, ahead: int) -> str:
    """
    >>> queued("gpu", 3), queued("gpu", 0)
    ('queued behind 3 in group gpu', 'first in the queue of group gpu')
    """
    return (
        f"queued behind {ahead} in group {group}"
        if ahead
        else f"first in the queue of group {group}"
    )


def counted(number: int, noun: str) -> str:
    """
    >>> counted(1, "worker"), counted(2, "worker")
    ('1 worker', '2 workers')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def lasting(seconds: float) -> str:
    """
    >>> lasting(3.2), lasting(240), lasting(3725), lasting(200000)
    ('3 s', '4 min', '1 h 2 min', '2 d 7 h')
    """
    total = max(0, int(seconds))
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def since(moment: datetime, now: datetime) -> str:
    """`since 12:03:05 UTC (4 min)`, with the date when it is not of the last day."""
    seconds = (now - moment).total_seconds()
    form = "%H:%M:%S" if seconds < 86400 else "%Y-%m-%d %H:%M"
    return f"since {moment.strftime(form)} UTC ({lasting(seconds)})"


def _nobody(group: str, *, local: bool, max_agents: int | None) -> Wait:
    if not local:
        return Wait(
            state="no-worker",
            text=f"no worker of group {group} has checked in",
            next_step=f"{_start(group)}, or choose another environment",
        )
    if max_agents == 0:
        return Wait(
            state="no-worker",
            text=f"group {group} may start no agent on this host: its max_agents is 0",
            next_step="raise max_agents of the group in valohai.toml",
        )
    return Wait(
        state="starting-worker",
        text=f"waiting for an agent of group {group} to start on this host",
    )


def _other_version(group: str, workers: Collection[Worker]) -> Wait:
    spoken = sorted({f"{w.protocol_min} to {w.protocol}" for w in workers})
    versions = ", ".join(sorted({f"{w.name} {w.version}" for w in workers})[:5])
    return Wait(
        state="version-mismatch",
        text=f"no worker of group {group} understands this job: it needs protocol {PROTOCOL_VERSION}, they speak "
        f"{' and '.join(spoken)} ({versions})",
        next_step="install the matching version of valohai-agent on them",
    )


def _draining(group: str, workers: int, ahead: int, *, local: bool) -> Wait:
    who = (
        f"the only worker of group {group}"
        if workers == 1
        else f"all {workers} workers of group {group}"
    )
    ends = (
        "drains: it finishes what it runs and takes"
        if workers == 1
        else ("drain: they finish what they run and take")
    )
    return Wait(
        state="draining",
        text=f"{queued(group, ahead)}: {who} {ends} nothing new",
        next_step="another agent starts once it has gone" if local else _start(group),
    )


def _start(group: str) -> str:
    return f"start one with `valohai-agent run --queue {group}`"
