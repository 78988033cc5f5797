"""One word for how a machine stands. Pure."""

from __future__ import annotations

from valohai_dagster.capacity.book import Known
from valohai_dagster.capacity.model import MachineState

STATES = (
    "starting",  # asked for or booting, no worker of it has checked in
    "idle",
    "busy",
    "draining",  # told to finish and go
    "silent",  # its worker has stopped checking in
    "stopping",
    "stopped",
    "terminating",
    "orphan",  # nobody's: ended when it stays so
    "missing",  # the cloud does not list it, which is not believed yet
    "gone",
)


def state_of(known: Known, busy: int | None) -> str:
    """`busy`: executions of the workers on it, None when none of them is checked in now."""
    if known.gone_at is not None:
        return "gone"
    if known.missing_since is not None:
        return "missing"
    if known.machine.state is not MachineState.running:
        return known.machine.state.value
    if known.orphan_since is not None:
        return "orphan"
    if busy:
        return "busy"
    if known.draining_since is not None:
        return "draining"
    if known.registered_at is None:
        return "starting"
    return "idle" if busy == 0 else "silent"
