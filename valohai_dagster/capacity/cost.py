"""What machines have cost, and for what: executions, start-up, idleness, attempts that were lost (L-40, L-41). Pure.

A machine costs its price for the time that it exists and is not stopped. Each of its slots has an equal share of that: an
execution costs the share of one slot from the moment when a worker takes it until it has ended, whoever else is there.
What is left is start-up, until a worker is first seen or takes something, and idleness. So the parts make the whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

_HOUR = Decimal(3600)
CENTS = Decimal("0.000001")  # as exact as prices are kept


@dataclass(frozen=True, kw_only=True)
class Life:
    """One machine. `until`: when it was gone, or now. `stopped_seconds`: of all its stops but the present one."""

    group: str
    machine_id: str
    price_per_hour: Decimal | None
    since: datetime
    until: datetime
    registered_at: datetime | None = None
    stopped_since: datetime | None = None
    stopped_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """One attempt at an execution. `price_per_hour`: of one slot. `lost`: it was given up, and another one followed."""

    execution_id: str
    group: str
    machine_id: str | None
    price_per_hour: Decimal | None
    since: datetime
    until: datetime
    lost: bool = False
    project: str = ""
    user: str | None = None
    team: str | None = None


@dataclass(frozen=True, kw_only=True)
class Window:
    """From `since` until just before `until`."""

    since: datetime
    until: datetime

    def seconds(self, since: datetime, until: datetime) -> float:
        """How much of that time lies in it."""
        length = min(until, self.until) - max(since, self.since)
        return max(0.0, length.total_seconds())


@dataclass(kw_only=True)
class Bill:
    """Amounts are in the currency of the prices. `unpriced`: hours of executions and machines whose price is not known."""

    executions: int = 0
    hours: float = 0.0  # of executions
    work: Decimal = Decimal(0)
    lost: Decimal = Decimal(0)
    start_up: Decimal = Decimal(0)
    idle: Decimal = Decimal(0)
    unpriced: float = 0.0

    @property
    def total(self) -> Decimal:
        return self.work + self.lost + self.start_up + self.idle


def price_of(price_per_hour: Decimal, seconds: float, *, slots: int = 1) -> Decimal:
    """Of one of `slots` slots for that time (L-40).

    >>> price_of(Decimal("3.60"), 90.0, slots=2)
    Decimal('0.045000')
    """
    return (Decimal(str(seconds)) * price_per_hour / (_HOUR * slots)).quantize(CENTS)


def bills(
    lives: Iterable[Life],
    works: Iterable[Work],
    window: Window,
    *,
    key: Callable[[Work], str],
    rest: Callable[[Life | Work], str],
) -> dict[str, Bill]:
    """By `key` of executions; what belongs to no execution goes to `rest` of its machine (L-41)."""
    found: dict[str, Bill] = defaultdict(Bill)
    counted: dict[str, set[str]] = defaultdict(set)
    by_machine: dict[tuple[str, str], list[Work]] = defaultdict(list)
    for work in works:
        if work.machine_id is not None:
            by_machine[work.group, work.machine_id].append(work)
        _add(found, counted, work, window, key=key, rest=rest)
    for life in lives:
        _add_rest(found[rest(life)], life, by_machine[life.group, life.machine_id], window)
    for name, ids in counted.items():
        found[name].executions = len(ids)
    return {name: bill for name, bill in found.items() if bill != Bill()}


def months(window: Window) -> list[tuple[str, Window]]:
    """Its calendar months in UTC, the first and the last one cut where it begins and ends.

    >>> from datetime import timezone
    >>> at = lambda month, day: datetime(2026, month, day, tzinfo=timezone.utc)
    >>> [(name, part.until.day) for name, part in months(Window(since=at(1, 20), until=at(2, 5)))]
    [('2026-01', 1), ('2026-02', 5)]
    """
    found, since = [], window.since
    while since < window.until:
        first = since.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        following = (first + timedelta(days=32)).replace(day=1)
        until = min(following, window.until)
        found.append((f"{since:%Y-%m}", Window(since=since, until=until)))
        since = until
    return found


def _add(
    found: dict[str, Bill],
    counted: dict[str, set[str]],
    work: Work,
    window: Window,
    *,
    key: Callable[[Work], str],
    rest: Callable[[Life | Work], str],
) -> None:
    seconds = window.seconds(work.since, work.until)
    if not seconds:
        return
    name = rest(work) if work.lost else key(work)
    bill = found[name]
    if work.price_per_hour is None:
        bill.unpriced += seconds / 3600
    elif work.lost:
        bill.lost += price_of(work.price_per_hour, seconds)
    if work.lost:
        return
    counted[name].add(work.execution_id)
    bill.hours += seconds / 3600
    if work.price_per_hour is not None:
        bill.work += price_of(work.price_per_hour, seconds)


def _add_rest(bill: Bill, life: Life, works: Collection[Work], window: Window) -> None:
    """Start-up, and idleness as what is left of the machine's time when all its executions have their shares."""
    paid = _paid_seconds(life, window)
    if not paid:
        return
    if life.price_per_hour is None:
        bill.unpriced += paid / 3600
        return
    taken = (work.since for work in works)  # perhaps while nobody looked who is there
    checked_in = min(life.registered_at or life.until, life.until, *taken)
    start_up = min(paid, window.seconds(life.since, checked_in))
    whole = price_of(life.price_per_hour, paid)
    began = price_of(life.price_per_hour, start_up)
    used = sum(
        (
            price_of(work.price_per_hour, window.seconds(work.since, work.until))
            for work in works
            if work.price_per_hour is not None
        ),
        Decimal(0),
    )
    bill.start_up += began
    bill.idle += max(Decimal(0), whole - began - used)


def _paid_seconds(life: Life, window: Window) -> float:
    """When earlier stops were is not known, only how long: they are spread evenly over its time after the start-up."""
    until = life.stopped_since or life.until  # the present stop costs nothing
    there = window.seconds(life.since, until)
    running = life.registered_at or life.since
    after = max(0.0, (until - running).total_seconds())
    if not life.stopped_seconds or not after:
        return there
    stopped = min(1.0, life.stopped_seconds / after) * window.seconds(running, until)
    return max(0.0, there - stopped)
