"""The reconciler's memory of one group, in the records.

Every write that rests on what was read before counts the group's turn on, and fails when somebody else has done so in
between: of two reconcilers that look after a group at the same time, the one with the older view is stopped before it
calls the cloud.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from valohai_dagster.capacity.book import Kind, Known, Overtaken
from valohai_dagster.capacity.model import (
    ActionKind,
    Hold,
    Intent,
    Machine,
    MachineState,
    Purchase,
)
from valohai_dagster.records.capacity_tables import capacity_events as events
from valohai_dagster.records.capacity_tables import holds as held
from valohai_dagster.records.capacity_tables import intents as asked
from valohai_dagster.records.capacity_tables import machines as table
from valohai_dagster.records.capacity_tables import turns
from valohai_dagster.records.engine import Records
from valohai_dagster.records.store import insert_ignore, upsert

LINES_KEPT = 5_000  # of each group's history
KEPT = timedelta(days=90)  # lines of the history, and intents that are settled
_TRIM_EVERY = 100  # lines
_AS_THEY_ARE = (
    "adopted",
    "listed_at",
    "orphan_since",
    "registered_at",
    "worker_seen_at",
    "draining_since",
    "stopped_since",
    "started_at",
    "stopped_seconds",
    "missing_since",
    "gone_at",
    "reason",
)


class MachineRecords:
    """The Book of a group. Not to be shared by reconcilers. `machines` comes first in a look: it says what turn it is."""

    def __init__(
        self,
        records: Records,
        group: str,
        *,
        kind: str = "",
        price_per_hour: Decimal | None = None,
        spot_price_per_hour: Decimal | None = None,
        slots: int | None = None,
        clock: Callable[[], datetime],
    ) -> None:
        """`kind`, the price and `slots` are written with machines that are new. Spot costs the same unless told."""
        self._records, self._group, self._clock = records, group, clock
        spot = price_per_hour if spot_price_per_hour is None else spot_price_per_hour
        self._prices = {Purchase.on_demand: price_per_hour, Purchase.spot: spot}
        self._kind, self._slots = kind, slots
        self._turn: int | None = None
        self._lines = 0

    def machines(self) -> Sequence[Known]:
        mine = (table.c.group_name == self._group) & table.c.gone_at.is_(None)
        with self._records.read() as conn:
            # The turn first: whoever writes after it is read is noticed.
            query = sa.select(turns.c.turn).where(turns.c.group_name == self._group)
            self._turn = conn.execute(query).scalar() or 0
            return [known_of(row) for row in conn.execute(sa.select(table).where(mine))]

    def gone_since(self, at: datetime) -> dict[str, datetime]:
        mine = (table.c.group_name == self._group) & (table.c.gone_at > at)
        with self._records.read() as conn:
            rows = conn.execute(sa.select(table.c.machine_id, table.c.gone_at).where(mine))
            return {row.machine_id: row.gone_at for row in rows}

    def save(self, *known: Known) -> None:
        with self._my_turn() as conn:
            for one in known:
                self._save(conn, one)

    def intents(self) -> Sequence[Intent]:
        mine = (asked.c.group_name == self._group) & asked.c.settled_at.is_(None)
        with self._records.read() as conn:
            rows = conn.execute(sa.select(asked).where(mine).order_by(asked.c.at, asked.c.token))
            return [_intent(row) for row in rows]

    def intend(self, intent: Intent) -> None:
        values = {
            "token": intent.token,
            "group_name": self._group,
            "action": intent.action.value,
            "zone": intent.zone,
            "purchase": intent.purchase.value,
            "count": intent.count,
            "machine_id": intent.machine_id,
            "reason": intent.reason,
            "at": intent.at,
        }
        with self._my_turn() as conn:
            conn.execute(asked.insert().values(values))

    def settle(self, token: str, outcome: str) -> None:
        mine = (asked.c.token == token) & asked.c.settled_at.is_(None)
        with self._records.write() as conn:
            conn.execute(
                asked.update().where(mine).values(settled_at=self._clock(), outcome=outcome)
            )

    def holds(self) -> Sequence[Hold]:
        query = sa.select(held).where(held.c.group_name == self._group).order_by(held.c.until)
        with self._records.read() as conn:
            return [hold_of(row) for row in conn.execute(query)]

    def hold(self, hold: Hold) -> None:
        with self._records.write() as conn:
            upsert(
                conn,
                held,
                group_name=self._group,
                zone=hold.zone or "",
                purchase=hold.purchase.value if hold.purchase else "",
                until=hold.until,
                reason=hold.reason,
                failures=hold.failures,
            )

    def release(self, zone: str | None, purchase: Purchase | None) -> None:
        mine = (
            (held.c.group_name == self._group)
            & (held.c.zone == (zone or ""))
            & (held.c.purchase == (purchase.value if purchase else ""))
        )
        with self._records.write() as conn:
            conn.execute(held.delete().where(mine))

    def note(self, kind: Kind, text: str, *, machine_id: str | None = None) -> None:
        now = self._clock()
        with self._records.write() as conn:
            conn.execute(
                events.insert().values(
                    group_name=self._group,
                    at=now,
                    kind=kind.value,
                    machine_id=machine_id,
                    text=text,
                )
            )
            if self._lines % _TRIM_EVERY == 0:
                _trim(conn, self._group, now)
        self._lines += 1

    def _save(self, conn: sa.Connection, known: Known) -> None:
        machine = known.machine
        key = {"group_name": self._group, "machine_id": machine.id}
        values: dict[str, Any] = {
            "token": machine.token,
            "zone": machine.zone,
            "purchase": machine.purchase.value,
            "state": machine.state.value,
            "bootstrap": machine.bootstrap,
            "reclaimed_at": machine.reclaimed_at,
            "created_at": machine.created_at,
            **{name: getattr(known, name) for name in _AS_THEY_ARE},
        }
        mine = (table.c.group_name == self._group) & (table.c.machine_id == machine.id)
        if conn.execute(table.update().where(mine).values(values)).rowcount == 0:
            price = self._prices[machine.purchase]
            new = {"kind": self._kind, "price_per_hour": price, "slots": self._slots}
            conn.execute(table.insert().values({**key, **new, **values}))

    @contextmanager
    def _my_turn(self) -> Iterator[sa.Connection]:
        if self._turn is None:
            self.machines()
        turn = self._turn or 0
        with self._records.write() as conn:
            if turn == 0:
                insert_ignore(conn, turns, group_name=self._group, turn=0)
            mine = (turns.c.group_name == self._group) & (turns.c.turn == turn)
            if conn.execute(turns.update().where(mine).values(turn=turn + 1)).rowcount == 0:
                raise Overtaken(
                    f"another process has changed what is known of the machines of group {self._group!r} since they were"
                    " looked at; look again"
                )
            yield conn
        self._turn = turn + 1


def known_of(row: Any) -> Known:
    """From a row of vh_machines."""
    machine = Machine(
        id=row.machine_id,
        zone=row.zone,
        purchase=Purchase(row.purchase),
        state=MachineState(row.state),
        created_at=row.created_at,
        token=row.token,
        bootstrap=row.bootstrap,
        reclaimed_at=row.reclaimed_at,
    )
    return Known(machine=machine, **{name: getattr(row, name) for name in _AS_THEY_ARE})


def hold_of(row: Any) -> Hold:
    """From a row of vh_capacity_holds."""
    return Hold(
        zone=row.zone or None,
        purchase=Purchase(row.purchase) if row.purchase else None,
        until=row.until,
        reason=row.reason,
        failures=row.failures,
    )


def _intent(row: Any) -> Intent:
    return Intent(
        token=row.token,
        action=ActionKind(row.action),
        at=row.at,
        zone=row.zone,
        purchase=Purchase(row.purchase),
        count=row.count,
        machine_id=row.machine_id,
        reason=row.reason,
    )


def _trim(conn: sa.Connection, group: str, now: datetime) -> None:
    mine = events.c.group_name == group
    newest = sa.select(events.c.id).where(mine).order_by(events.c.id.desc())
    last = conn.execute(newest.offset(LINES_KEPT).limit(1)).scalar()
    conn.execute(events.delete().where(mine & (events.c.at < now - KEPT)))
    if last is not None:
        conn.execute(events.delete().where(mine & (events.c.id <= last)))
    conn.execute(
        asked.delete().where((asked.c.group_name == group) & (asked.c.settled_at < now - KEPT))
    )
