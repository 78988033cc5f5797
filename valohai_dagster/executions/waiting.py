"""Why an execution waits, in words. Pure."""

from __future__ import annotations

from collections.abc import Collection

from valohai_agent.protocol import PROTOCOL_VERSION, Worker, WorkerState


def why_it_waits(group: str, workers: Collection[Worker], *, local: bool, ahead: int) -> str:
    """One line for somebody whose execution stays in the queue of `group`, with the next step where there is one."""
    if not workers:
        if local:
            return f"waiting for an agent of group {group} to start on this host"
        return (
            f"no worker of group {group} has checked in; start one with `valohai-agent run --queue {group}`, "
            "or choose another environment"
        )
    able = [w for w in workers if w.protocol_min <= PROTOCOL_VERSION <= w.protocol]
    if not able:
        spoken = sorted({f"{w.protocol_min} to {w.protocol}" for w in workers})
        versions = ", ".join(sorted({f"{w.name} {w.version}" for w in workers})[:5])
        return (
            f"no worker of group {group} understands this job: it needs protocol {PROTOCOL_VERSION}, they speak "
            f"{' and '.join(spoken)} ({versions}); install the matching version of valohai-agent on them"
        )
    serving = [w for w in able if w.state is not WorkerState.draining]
    slots = sum(w.slots for w in serving)
    busy = sum(w.busy for w in serving)
    before = f", {ahead} ahead" if ahead else ""
    return f"waiting for a free slot in group {group}: {busy} of {slots} busy on {len(serving)} workers{before}"
