"""Machines of groups that were taken out of the settings: no conductor looks after those any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from valohai_dagster.records.capacity_tables import machines as table
from valohai_dagster.settings_groups import AnyGroupSettings, CloudGroupSettings


@dataclass(frozen=True, kw_only=True)
class LeftBehind:
    """Machines of one group, as the last conductor that looked after it has left them in the records."""

    group: str
    kind: str
    machines: int

    @property
    def trouble(self) -> str:
        """What is wrong, and how it is put right."""
        return (
            f"no {self.kind} group in the settings any more; nobody ends its machines ({self.machines}): put it back,"
            f" `groups disable {self.group}`, remove it when `machines ls` has none"
        )


def left_behind(conn: sa.Connection, groups: Mapping[str, AnyGroupSettings]) -> list[LeftBehind]:
    """By name. A group that has become one without machines of its own counts too."""
    c = table.c
    scaling = [name for name, one in groups.items() if isinstance(one, CloudGroupSettings)]
    query = (
        sa.select(c.group_name, sa.func.max(c.kind), sa.func.count())
        .where(c.gone_at.is_(None), c.group_name.not_in(scaling))
        .group_by(c.group_name)
        .order_by(c.group_name)
    )
    return [
        LeftBehind(group=name, kind=kind, machines=count)
        for name, kind, count in conn.execute(query)
    ]
