"""Workers on machines that are done with: such a machine counts as gone, and yet it lives where no list shows it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime

from valohai_dagster.capacity.model import Seat

_WHY = "its machine counts as gone"


class Strangers:
    """Those of one group. They are told to finish and go, are given no work by the plan, and are said to be there."""

    def __init__(self) -> None:
        self._seats: tuple[Seat, ...] = ()

    def look(
        self, seats: Iterable[Seat], closed: Mapping[str, datetime]
    ) -> Iterator[tuple[str, str]]:
        """`closed`: machines that are done with, and since when. Returns those that were not seen at the last look, with words."""
        before = {seat.machine_id for seat in self._seats}
        self._seats = tuple(
            seat
            for seat in seats
            if seat.machine_id in closed and seat.seen_at > closed[seat.machine_id]
        )
        new = {seat.machine_id: _words(seat) for seat in self._seats}
        return ((machine_id, text) for machine_id, text in new.items() if machine_id not in before)

    def without(self, seats: Iterable[Seat]) -> tuple[Seat, ...]:
        """Those of the group's own machines."""
        return tuple(seat for seat in seats if seat not in self._seats)

    def to_drain(self) -> Iterator[tuple[str, str]]:
        """Workers that have not begun to, with the reason."""
        return ((seat.worker, _WHY) for seat in self._seats if not seat.draining)

    def troubles(self) -> Iterator[str]:
        return (f"machine {seat.machine_id}: {_words(seat)}" for seat in self._seats)


def _words(seat: Seat) -> str:
    return (
        f"it counts as gone, as the cloud did not list it, yet its worker {seat.worker} is there: told to finish and go."
        " Look in the cloud's console whether the machine ends"
    )
