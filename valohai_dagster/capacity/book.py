"""What is remembered of a group's machines between two looks, whoever looks: the reconciler's memory.

`MachineRecords` keeps it in the records; the simulation has one in memory. Each call is one transaction and
survives the death of the process right after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Protocol

from valohai_dagster.capacity.model import Hold, Intent, Machine, Purchase
from valohai_dagster.errors import ValohaiError


class Overtaken(ValohaiError):
    """Somebody else has written to the book since it was read: nothing was written, and what was decided is void."""


class Kind(str, Enum):
    """What a line of a group's history is about."""

    decision = "decision"
    trouble = "trouble"
    cleared = "cleared"
    adopted = "adopted"
    orphan = "orphan"
    registered = "registered"
    lost = "lost"
    gone = "gone"


@dataclass(frozen=True, kw_only=True)
class Known:
    """A machine as it is remembered. `machine` is what the last list had of it."""

    machine: Machine
    adopted: bool = False  # found, not launched by us
    listed_at: datetime
    orphan_since: datetime | None = None  # first phase of being removed as nobody's
    registered_at: datetime | None = None  # when a worker of it first checked in
    worker_seen_at: datetime | None = None  # when one last did
    draining_since: datetime | None = None
    stopped_since: datetime | None = None
    started_at: datetime | None = None  # again after a stop, the last time
    stopped_seconds: float = 0.0  # of all its stops that are over
    missing_since: datetime | None = None  # first list that did not have it any more
    gone_at: datetime | None = None  # confirmed
    reason: str | None = None  # why it is as it is, or why it went, for people


class Book(Protocol):
    """The memory of one group. `save` and `intend` raise Overtaken."""

    def machines(self) -> Sequence[Known]:
        """Those that are not known to be gone. Read first in a look."""
        ...

    def gone_since(self, at: datetime) -> Mapping[str, datetime]:
        """Ids of machines that were confirmed to be gone after `at`, and when."""
        ...

    def save(self, *known: Known) -> None: ...

    def intents(self) -> Sequence[Intent]:
        """Those that are not settled."""
        ...

    def intend(self, intent: Intent) -> None: ...

    def settle(self, token: str, outcome: str) -> None: ...

    def holds(self) -> Sequence[Hold]: ...

    def hold(self, hold: Hold) -> None:
        """Replaces the one of the same zone and purchase."""
        ...

    def release(self, zone: str | None, purchase: Purchase | None) -> None: ...

    def note(self, kind: Kind, text: str, *, machine_id: str | None = None) -> None:
        """Adds a line to the group's history."""
        ...
