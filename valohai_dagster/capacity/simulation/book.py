"""A book in memory, for the simulation and for tests of your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from valohai_dagster.capacity.book import Kind, Known
from valohai_dagster.capacity.model import Hold, Intent, Purchase


class MemoryBook:
    """What is remembered of one group; it outlives the reconcilers that use it, as the records do."""

    def __init__(self) -> None:
        self._machines: dict[str, Known] = {}
        self._intents: dict[str, Intent] = {}
        self._holds: dict[tuple[str | None, Purchase | None], Hold] = {}
        self._gone_at: dict[str, datetime] = {}
        self.outcomes: dict[str, str] = {}  # of settled intents
        self.history: list[tuple[Kind, str, str | None]] = []

    def machines(self) -> Sequence[Known]:
        return list(self._machines.values())

    @property
    def gone(self) -> set[str]:
        """Machines that were ever confirmed to be gone."""
        return set(self._gone_at)

    def gone_since(self, at: datetime) -> Mapping[str, datetime]:
        return {one: gone_at for one, gone_at in self._gone_at.items() if gone_at > at}

    def save(self, *known: Known) -> None:
        for one in known:
            if one.gone_at is None:
                self._machines[one.machine.id] = one
            else:
                self._machines.pop(one.machine.id, None)
                self._gone_at[one.machine.id] = one.gone_at

    def intents(self) -> Sequence[Intent]:
        return list(self._intents.values())

    def intend(self, intent: Intent) -> None:
        self._intents[intent.token] = intent

    def settle(self, token: str, outcome: str) -> None:
        self._intents.pop(token, None)
        self.outcomes[token] = outcome

    def holds(self) -> Sequence[Hold]:
        return list(self._holds.values())

    def hold(self, hold: Hold) -> None:
        self._holds[hold.zone, hold.purchase] = hold

    def release(self, zone: str | None, purchase: Purchase | None) -> None:
        self._holds.pop((zone, purchase), None)

    def note(self, kind: Kind, text: str, *, machine_id: str | None = None) -> None:
        self.history.append((kind, text, machine_id))
