"""What the records tell people of machines: which there are, what became of them, and what was decided and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from valohai_dagster.capacity.book import Known
from valohai_dagster.capacity.cost import price_of
from valohai_dagster.capacity.machines import hold_of, known_of
from valohai_dagster.capacity.model import Hold
from valohai_dagster.capacity.standing import state_of
from valohai_dagster.records.capacity_tables import capacity_events as events
from valohai_dagster.records.capacity_tables import holds as held
from valohai_dagster.records.capacity_tables import intents as asked
from valohai_dagster.records.capacity_tables import machines as table

SHOWN = 1_000


@dataclass(frozen=True, kw_only=True)
class MachineRow:
    """One machine, also one that is gone."""

    group: str
    kind: str
    price_per_hour: Decimal | None
    known: Known

    def state(self, busy: int | None = None) -> str:
        """One word. `busy`: executions of the workers on it, None when none has checked in."""
        return state_of(self.known, busy)

    def age(self, now: datetime) -> float:
        """Seconds from its launch until now, or until it was gone."""
        return ((self.known.gone_at or now) - self.known.machine.created_at).total_seconds()

    def paid_seconds(self, now: datetime) -> float:
        """Its age without the times in which it was stopped."""
        known, stopped = self.known, self.known.stopped_seconds
        if known.stopped_since is not None:
            stopped += ((known.gone_at or now) - known.stopped_since).total_seconds()
        return max(0.0, self.age(now) - stopped)

    def cost(self, now: datetime) -> Decimal | None:
        """What it has cost so far; None when its price is not known."""
        if self.price_per_hour is None:
            return None
        return price_of(self.price_per_hour, self.paid_seconds(now))


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a group's history."""

    id: int
    group: str
    at: datetime
    kind: str
    machine_id: str | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A call to the cloud whose effect is not confirmed yet."""

    token: str
    action: str
    at: datetime
    zone: str
    purchase: str
    count: int
    machine_id: str | None
    reason: str


def machines_of(
    conn: sa.Connection,
    group: str | None = None,
    *,
    gone: bool = False,
    limit: int = SHOWN,
) -> list[MachineRow]:
    """Newest first; `gone`: those that are no more too."""
    query = sa.select(table).order_by(table.c.created_at.desc(), table.c.machine_id).limit(limit)
    if group is not None:
        query = query.where(table.c.group_name == group)
    if not gone:
        query = query.where(table.c.gone_at.is_(None))
    return [_row(row) for row in conn.execute(query)]


def machines_named(conn: sa.Connection, name: str) -> list[MachineRow]:
    """Those whose id is this one or, if there is none such, begins so."""
    for which in (table.c.machine_id == name, table.c.machine_id.startswith(name, autoescape=True)):
        found = [_row(row) for row in conn.execute(sa.select(table).where(which).limit(SHOWN))]
        if found:
            return found
    return []


def history(
    conn: sa.Connection,
    group: str | None = None,
    *,
    machine_id: str | None = None,
    after: int | None = None,
    limit: int = 50,
) -> list[Line]:
    """The newest lines, oldest of them first; with `after` the oldest of those with a greater id."""
    c = events.c
    query = sa.select(events).limit(limit)
    if group is not None:
        query = query.where(c.group_name == group)
    if machine_id is not None:
        query = query.where(c.machine_id == machine_id)
    if after is not None:
        rows: Sequence[Any] = conn.execute(query.where(c.id > after).order_by(c.id)).all()
    else:
        rows = conn.execute(query.order_by(c.id.desc())).all()[::-1]
    return [
        Line(
            id=row.id,
            group=row.group_name,
            at=row.at,
            kind=row.kind,
            machine_id=row.machine_id,
            text=row.text,
        )
        for row in rows
    ]


def newest_line(conn: sa.Connection) -> int:
    """Id of the newest line of all; 0 when there is none."""
    return conn.execute(sa.select(sa.func.max(events.c.id))).scalar() or 0


def holds_of(conn: sa.Connection, group: str, now: datetime) -> list[Hold]:
    """Where nothing is launched at this moment."""
    mine = (held.c.group_name == group) & (held.c.until > now)
    return [hold_of(row) for row in conn.execute(sa.select(held).where(mine))]


def asked_for(conn: sa.Connection, group: str) -> list[Asked]:
    """Calls to the cloud whose effect is not confirmed yet, oldest first."""
    c = asked.c
    mine = (c.group_name == group) & c.settled_at.is_(None)
    names = list(Asked.__dataclass_fields__)
    query = sa.select(*(c[name] for name in names)).where(mine).order_by(c.at)
    return [Asked(**row._mapping) for row in conn.execute(query)]


def _row(row: Any) -> MachineRow:
    return MachineRow(
        group=row.group_name,
        kind=row.kind,
        price_per_hour=row.price_per_hour,
        known=known_of(row),
    )
