"""What a look at a group begins with, what it collects, and what it has come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from valohai_dagster.capacity.book import Known
from valohai_dagster.capacity.fleet import BLINK
from valohai_dagster.capacity.inventory import Inventory, by_machine
from valohai_dagster.capacity.model import Policy, Seat
from valohai_dagster.capacity.patience import Patience


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the queue and the workers of the group are like now."""

    waiting: Mapping[int, int] = field(default_factory=dict)  # jobs by priority
    seats: tuple[Seat, ...] = ()
    watched_since: datetime | None = None  # see View


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a look has come to. `trouble` is in words for those who wait, None when nothing is wrong.

    `drain`: workers to be told to finish and go, with the reason; told again later if they do not. `dead`: machines that
    are surely gone since the last look, with what happened to them; after a crash one may be told twice. `next_look`:
    when something is due by time alone, such as the end of a hold.
    """

    summary: str = ""
    decisions: tuple[str, ...] = ()
    drain: Mapping[str, str] = field(default_factory=dict)
    dead: Mapping[str, str] = field(default_factory=dict)
    trouble: str | None = None
    next_look: datetime | None = None


class Look:
    """What is collected during one step."""

    def __init__(self, load: Load, policy: Policy, now: datetime, inventory: Inventory) -> None:
        self.load, self.policy, self.now, self.inventory = load, policy, now, inventory
        self.seats = by_machine(load.seats)
        self.decisions: list[str] = []
        self.drain: dict[str, str] = {}
        self.draining: set[str] = set()  # machines that are from now on
        self.refused = False  # something that another zone or way of buying may give

    @property
    def wanted(self) -> bool:
        """More machines may be asked for."""
        return self.policy.enabled and bool(
            sum(self.load.waiting.values()) or self.policy.min_machines
        )

    def may_live(self, known: Known, patience: Patience) -> bool:
        """Whether a machine that no list has may be there all the same: a worker of it spoke a moment ago.

        One whose worker went on speaking after the lists had dropped it is where the driver does not look: the lists say
        nothing about it, so it is waited for as long as for any silent machine. While nobody could be heard, nobody was
        silent.
        """
        times = [seat.seen_at for seat in self.seats.get(known.machine.id, ())]
        seen = max((at for at in (known.worker_seen_at, *times) if at), default=None)
        if seen is None:
            return False
        since = known.missing_since
        elsewhere = since is not None and seen - since >= patience.confirm
        silent = self.now - max(seen, self.load.watched_since or seen)
        return silent < (self.policy.silence if elsewhere else BLINK)

    def orphaned(self, known: Known) -> bool:
        """Nobody's, and not just about to check in either."""
        young = self.now - known.machine.created_at < self.policy.boot
        return known.orphan_since is not None and not young
