"""Access to groups and their quotas, as the records have them at the moment of a transaction (L-10 to L-12).

An execution beyond a quota stays `created`: what makes it so is in the records alone, so any conductor may go on with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import sqlalchemy as sa

from valohai_dagster.capacity.overrides import effective
from valohai_dagster.executions.access import (
    Claim,
    Launcher,
    Turns,
    has_quotas,
    require_access,
    teams_of,
)
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.executions.stream import ExecutionStatus as Status
from valohai_dagster.executions.writing import Writing
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import AnyGroupSettings

_UNFINISHED = [status.value for status in Status if not status.final]


def launcher_of_spec(spec: ExecutionSpec) -> Launcher:
    return Launcher(user=spec.creator, teams=tuple(spec.teams), organization=spec.organization)


def held(conn: sa.Connection, settings: Settings, groups: Collection[str]) -> dict[str, str]:
    """Executions of these groups that wait for a quota, and why."""
    found: dict[str, str] = {}
    for name in sorted(set(groups) & set(settings.groups)):
        group = effective(conn, name, settings.groups[name])
        if has_quotas(group):
            found |= Turns(name, group, _claims(conn, name)).obstacles
    return found


class Gate:
    """For one transaction."""

    def __init__(self, writing: Writing, settings: Settings) -> None:
        self._writing, self._settings = writing, settings
        self._groups: dict[str, AnyGroupSettings] = {}
        self._turns: dict[str, Turns] = {}

    def enter(self, groups: Iterable[str]) -> None:
        """Reads these groups; of those with quotas nobody else queues anything before this transaction ends."""
        conn = self._writing.conn
        for name in sorted(set(groups) - set(self._groups)):
            group = self._groups[name] = effective(conn, name, self._settings.groups[name])
            if not has_quotas(group):
                continue
            if conn.dialect.name == "postgresql":  # SQLite has one writer anyway
                conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_lock_number(name))))
            self._writing.flush()
            self._turns[name] = Turns(name, group, _claims(conn, name))

    def require(self, spec: ExecutionSpec, group: str) -> None:
        """Raises RefusedError when whoever launched it may not use the group."""
        self.enter([group])
        require_access(group, self._groups[group], launcher_of_spec(spec))

    def obstacle(self, spec: ExecutionSpec, group: str, counter: int) -> str | None:
        """Why it has to stay `created` for now; None when it may be queued, and then it counts.

        `counter`: of the execution, in its project.
        """
        self.enter([group])
        turns = self._turns.get(group)
        if turns is None:
            return None
        return turns.take(
            Claim(
                id=spec.execution_id,
                launcher=launcher_of_spec(spec),
                waits=True,
                priority=spec.priority,
                at=self._writing.now,
                counter=counter,
            )
        )


def _claims(conn: sa.Connection, group: str) -> list[Claim]:
    c = t.executions.c
    query = sa.select(
        c.id, c.status, c.user_name, c.team_name, c.priority, c.ctime, c.counter
    ).where(c.group_name == group, c.status.in_(_UNFINISHED))
    return [
        Claim(
            id=row.id,
            launcher=Launcher(user=row.user_name or "", teams=teams_of(row.team_name)),
            waits=row.status == Status.created.value,
            priority=row.priority,
            at=row.ctime,
            counter=row.counter,
        )
        for row in conn.execute(query)
    ]


def _lock_number(group: str) -> int:
    """Two groups of one number only wait for each other."""
    return 0x76680000 + sum(number * byte for number, byte in enumerate(group.encode(), 1)) % 0xFFFF
