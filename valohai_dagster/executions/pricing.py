"""Prices of executions and machines, from the records and the settings of groups (L-40)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from valohai_dagster.capacity.cost import Life, Window, Work, price_of
from valohai_dagster.capacity.overrides import fitted
from valohai_dagster.records import tables as t
from valohai_dagster.records.capacity_tables import group_overrides, machines
from valohai_dagster.settings_groups import AnyGroupSettings, CloudGroupSettings

_E, _A, _M = t.executions.c, t.attempts.c, machines.c
_ON_IT = sa.and_(_M.group_name == _E.group_name, _M.machine_id == _A.machine_id)


@dataclass(frozen=True, kw_only=True)
class Tariff:
    """What one machine of a group costs now, and among how many slots that is shared."""

    price_per_hour: Decimal | None
    slots: int = 1


def tariffs(conn: sa.Connection, groups: Mapping[str, AnyGroupSettings]) -> dict[str, Tariff]:
    """Of each group, with what was changed at run time."""
    changed = {row.group_name: row.settings for row in conn.execute(sa.select(group_overrides))}
    return {name: _tariff(name, group, changed.get(name)) for name, group in groups.items()}


def write_prices(
    conn: sa.Connection, execution_ids: Collection[str], groups: Mapping[str, AnyGroupSettings]
) -> None:
    """Of executions that have ended: the time of their last attempt, unless that was lost.

    Price and slots are those that the machine had when it was launched; of machines that nobody launched, the group's now.
    """
    known = tariffs(conn, groups)
    launched = any(isinstance(group, CloudGroupSettings) for group in groups.values())
    if not launched and all(tariff.price_per_hour is None for tariff in known.values()):
        return  # there may be nothing with a price
    last = sa.and_(_A.execution_id == _E.id, _A.number == _E.attempt)
    query = (
        sa.select(_E.id, _E.group_name, _E.ended_at, _A.leased_at, _M.price_per_hour, _M.slots)
        .select_from(t.executions.join(t.attempts, last).outerjoin(machines, _ON_IT))
        .where(_E.id.in_(execution_ids), _E.ended_at.is_not(None), _A.leased_at.is_not(None))
        .where(sa.or_(_A.end.is_(None), _A.end != "lost"))
    )
    prices = []
    for row in conn.execute(query).all():
        per_hour = _slot_price(row, known)
        if per_hour is not None:
            seconds = max(0.0, (row.ended_at - row.leased_at).total_seconds())
            prices.append({"one": row.id, "amount": price_of(per_hour, seconds)})
    if prices:
        mine = t.executions.update().where(_E.id == sa.bindparam("one"))
        conn.execute(mine.values(price=sa.bindparam("amount")), prices)


def lives(
    conn: sa.Connection, window: Window, now: datetime, *, group: str | None = None
) -> list[Life]:
    """Machines that were there in that time."""
    query = sa.select(machines).where(
        _M.created_at < window.until,
        sa.or_(_M.gone_at.is_(None), _M.gone_at > window.since),
    )
    if group is not None:
        query = query.where(_M.group_name == group)
    return [
        Life(
            group=row.group_name,
            machine_id=row.machine_id,
            price_per_hour=row.price_per_hour,
            since=row.created_at,
            until=row.gone_at or row.missing_since or now,
            registered_at=row.registered_at,
            stopped_since=row.stopped_since,
            stopped_seconds=row.stopped_seconds,
        )
        for row in conn.execute(query)
    ]


def works(
    conn: sa.Connection,
    window: Window,
    now: datetime,
    groups: Mapping[str, AnyGroupSettings],
    *,
    group: str | None = None,
) -> Iterator[Work]:
    """Attempts that were under way in that time, also those that still are."""
    ended = sa.func.coalesce(_A.ended_at, _E.ended_at, type_=_E.ended_at.type)
    query = (
        sa.select(
            _E.id,
            _E.group_name,
            _E.user_name,
            _E.team_name,
            t.projects.c.name.label("project"),
            _A.machine_id,
            _A.leased_at,
            ended.label("ended_at"),
            sa.or_(_A.end == "lost", _A.number < _E.attempt).label("lost"),
            _M.price_per_hour,
            _M.slots,
        )
        .select_from(
            t.attempts.join(t.executions, _A.execution_id == _E.id)
            .join(t.projects, t.projects.c.id == _E.project_id)
            .outerjoin(machines, _ON_IT)
        )
        .where(_A.leased_at < window.until, sa.or_(ended.is_(None), ended > window.since))
    )
    if group is not None:
        query = query.where(_E.group_name == group)
    known = tariffs(conn, groups)
    for row in conn.execute(query):
        yield Work(
            execution_id=row.id,
            group=row.group_name,
            machine_id=row.machine_id,
            price_per_hour=_slot_price(row, known),
            since=row.leased_at,
            until=max(row.leased_at, row.ended_at or now),
            lost=bool(row.lost),
            project=row.project,
            user=row.user_name,
            team=row.team_name,
        )


def _slot_price(row: Any, known: Mapping[str, Tariff]) -> Decimal | None:
    """Per hour; the machine's own price and slots first, those of its group else."""
    tariff = known.get(row.group_name, Tariff(price_per_hour=None))
    price = tariff.price_per_hour if row.price_per_hour is None else row.price_per_hour
    return None if price is None else price / (row.slots or tariff.slots)


def _tariff(name: str, group: AnyGroupSettings, changed: Mapping[str, Any] | None) -> Tariff:
    group, _ = fitted(name, group, changed or {})
    price, slots = group.price_per_hour, group.slots
    if isinstance(group, CloudGroupSettings):
        price = group.spot_price_per_hour if price is None else price
        slots *= group.agents
    return Tariff(price_per_hour=price, slots=max(1, slots))
