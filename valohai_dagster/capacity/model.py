"""What planning is about: a group's policy, what is seen of it, and what is to be done. No I/O, no clock of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum


class Purchase(str, Enum):
    """How a machine is paid for."""

    spot = "spot"
    on_demand = "on-demand"


class MachineState(str, Enum):
    """As the cloud has it. `starting` until the machine itself runs, whether or not its agent has checked in."""

    starting = "starting"
    running = "running"
    stopping = "stopping"
    stopped = "stopped"
    terminating = "terminating"
    gone = "gone"


class ActionKind(str, Enum):
    launch = "launch"
    start = "start"  # a stopped machine
    drain = "drain"  # a worker: it finishes what it runs and takes nothing new
    stop = "stop"
    terminate = "terminate"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine as its driver lists it. `token`: of the launch that made it, None where the cloud keeps none."""

    id: str
    zone: str = ""
    purchase: Purchase = Purchase.on_demand
    state: MachineState = MachineState.running
    created_at: datetime
    token: str | None = None
    bootstrap: str | None = None  # version of the bootstrap that it was launched with
    reclaimed_at: datetime | None = None  # the cloud takes it back then (spot)


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One worker that has checked in, on the machine `machine_id`.

    A worker that is silent but has work that is not yet given to another is listed too, as busy. `draining` is what the
    worker itself says: it has heard, and takes nothing new.
    """

    worker: str
    machine_id: str
    slots: int = 1
    busy: int = 0
    draining: bool = False
    outdated: bool = False
    idle_since: datetime | None = None
    seen_at: datetime


@dataclass(frozen=True, kw_only=True)
class Intent:
    """A call to the cloud that was written down before it was made, and whose effect is not confirmed yet."""

    token: str
    action: ActionKind
    at: datetime
    zone: str = ""
    purchase: Purchase = Purchase.on_demand
    count: int = 1
    machine_id: str | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Nothing is launched in `zone` by `purchase` (None: in any) before `until`, for `reason` as people read it.

    `failures`: refusals in a row that it stands for; the next one makes it longer.
    """

    zone: str | None = None
    purchase: Purchase | None = None
    until: datetime
    reason: str
    failures: int = 1


@dataclass(frozen=True, kw_only=True)
class View:
    """One group at one moment.

    `waiting`: jobs in the queue by priority. `listed_at` is None when the cloud could not be listed this time: then
    `machines` is what was seen last, and nothing is terminated for not being listed. `registered`: machines of which
    a worker has ever checked in. `drained`: machines whose workers were all told to drain, so that one without a worker
    has done so. `watched_since`: since when workers could check in and were looked at, without a break; None: always.
    """

    waiting: Mapping[int, int] = field(default_factory=dict)
    machines: tuple[Machine, ...] = ()
    seats: tuple[Seat, ...] = ()
    registered: frozenset[str] = frozenset()
    drained: frozenset[str] = frozenset()
    intents: tuple[Intent, ...] = ()
    holds: tuple[Hold, ...] = ()
    last_seen: Mapping[str, datetime] = field(
        default_factory=dict
    )  # of the last worker of a machine, by its id
    stopped_since: Mapping[str, datetime] = field(default_factory=dict)  # by machine id
    started: Mapping[str, datetime] = field(
        default_factory=dict
    )  # again after a stop, the last time, by machine id
    listed_at: datetime | None = None
    watched_since: datetime | None = None

    def silent_since(self, seen: datetime | None) -> datetime | None:
        """Of a machine a worker of which was `seen` last then. While nobody could be heard, nobody was silent."""
        times = [at for at in (seen, self.watched_since) if at is not None]
        return max(times, default=None)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the group's settings allow (E-01, E-05, E-07)."""

    enabled: bool = True
    min_machines: int = 0
    max_machines: int = 5
    slots: int = 1  # of each machine, all its agents together
    zones: tuple[str, ...] = ("",)
    spot: bool = False
    on_demand_fallback: bool = False
    grace: timedelta = timedelta(minutes=15)
    stop_when_idle: bool = False  # first stopped, then destroyed, where the driver can
    destroy_after: timedelta = timedelta(hours=1)  # of being stopped
    boot: timedelta = timedelta(minutes=15)  # without having checked in: replaced
    silence: timedelta = timedelta(
        minutes=7
    )  # of a machine's last worker; longer than a lost lease is waited for
    bootstrap: str | None = None  # the version that new machines get; others are outdated


@dataclass(frozen=True, kw_only=True)
class Action:
    """`reason` is a whole sentence for people. `worker` for drain, `machine_id` for start, stop and terminate."""

    kind: ActionKind
    reason: str
    count: int = 1
    zone: str = ""
    purchase: Purchase = Purchase.on_demand
    machine_id: str | None = None
    worker: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`summary`: one line on the group as a whole. `shortfall`: why not all that waits can be served, None if it can."""

    actions: tuple[Action, ...] = ()
    summary: str = ""
    shortfall: str | None = None
