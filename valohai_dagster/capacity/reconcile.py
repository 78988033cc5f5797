"""Brings the machines of one group to what its plan says: look, remember, plan, act."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from valohai_dagster.capacity.book import Book
from valohai_dagster.capacity.clouds.base import Driver, Launch
from valohai_dagster.capacity.model import Policy, Seat


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the queue and the workers of the group are like now."""

    waiting: Mapping[int, int] = field(default_factory=dict)  # jobs by priority
    oldest_waiting: datetime | None = None
    seats: tuple[Seat, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a look has come to. `trouble` is in words for those who wait, None when nothing is wrong.

    `drain`: workers to be told to finish and go, with the reason. `dead`: machines that are surely gone since the last
    look, with what happened to them. `next_look`: when something is due by time alone, such as the end of a hold.
    """

    summary: str = ""
    decisions: tuple[str, ...] = ()
    drain: Mapping[str, str] = field(default_factory=dict)
    dead: Mapping[str, str] = field(default_factory=dict)
    trouble: str | None = None
    next_look: datetime | None = None


class Reconciler:
    """One group. `step` blocks on the cloud's API; whoever calls it sees to it that nobody else does so for this group."""

    def __init__(
        self,
        group: str,
        driver: Driver,
        book: Book,
        *,
        prepare: Callable[[Launch], Launch],
        clock: Callable[[], datetime],
        make_token: Callable[[], str],
    ) -> None:
        """`prepare` completes a launch with user data (a join token among it) and tags."""
        self.group = group
        self._driver, self._book = driver, book
        self._prepare, self._clock, self._make_token = prepare, clock, make_token

    def step(self, load: Load, policy: Policy) -> Outcome:
        raise NotImplementedError
