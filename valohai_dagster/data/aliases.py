"""Datum aliases: movable names of datums within a project, with history (T-15)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from valohai_dagster.errors import RefusedError
from valohai_dagster.records.store import insert_ignore
from valohai_dagster.records.tables import datum_aliases, datums

MAX_NAME = 255
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def is_datum_id(text: str) -> bool:
    return _UUID.fullmatch(text) is not None


def check_alias(name: Any) -> str:
    """The name when it can be an alias; it must not look like a datum id and must survive in a URI."""
    if not isinstance(name, str) or not name.strip():
        raise RefusedError(f"{name!r} is no datum alias: expected one non-empty string")
    if len(name) > MAX_NAME or not name.isprintable() or name != name.strip():
        raise RefusedError(
            f"{name[:80]!r} is no datum alias: at most {MAX_NAME} printable characters, no outer spaces"
        )
    if "/" in name or "*" in name:
        raise RefusedError(
            f"{name!r} is no datum alias: it must not contain / or *, which have a meaning of their own in "
            "URIs and patterns; write - or . instead"
        )
    if is_datum_id(name):
        raise RefusedError(f"{name!r} is no datum alias: it looks like a datum id")
    return name


def find_alias(connection: sa.Connection, project_id: str, name: str) -> str | None:
    """The id of the datum that the alias points to now."""
    c = datum_aliases.c
    query = sa.select(c.datum_id).where(c.project_id == project_id, c.name == name)
    return connection.execute(query).scalar_one_or_none()


def set_alias(
    connection: sa.Connection, *, project_id: str, name: str, datum_id: str, now: datetime
) -> None:
    """Creates or moves an alias; every datum it ever pointed to stays in its history, oldest first."""
    check_alias(name)
    keys = {"project_id": project_id, "name": name}
    point(connection, datum_aliases, keys, "datum_id", datum_id, now)


def point(
    connection: sa.Connection,
    table: sa.Table,
    keys: Mapping[str, str],
    column: str,
    target: str,
    now: datetime,
) -> None:
    """Creates or moves a name with a history. Of writers that meet, each adds its move to what the others have done."""
    mine = sa.and_(*(table.c[key] == value for key, value in keys.items()))
    move = {column: target, "time": now.isoformat()}
    first = {**keys, column: target, "history": [move], "mtime": now}
    while not insert_ignore(connection, table, **first):
        query = sa.select(table.c[column], table.c.history).where(mine).with_for_update()
        known = connection.execute(query).one_or_none()
        if known is None:
            continue  # it was removed just now
        if known[0] != target:
            values = {column: target, "history": [*known.history, move], "mtime": now}
            connection.execute(table.update().where(mine).values(**values))
        return


def list_aliases(connection: sa.Connection, project_id: str | None = None) -> list[Any]:
    """Rows with `name`, `project_id`, `datum_id`, `mtime`, and `file`, the datum's name; of all projects without one."""
    c = datum_aliases.c
    query = (
        sa.select(c.name, c.project_id, c.datum_id, c.mtime, datums.c.name.label("file"))
        .join(datums, datums.c.id == c.datum_id)
        .order_by(c.name, c.project_id)
    )
    if project_id is not None:
        query = query.where(c.project_id == project_id)
    return list(connection.execute(query))


def remove_alias(connection: sa.Connection, project_id: str, name: str) -> bool:
    """Tells whether it was there."""
    mine = sa.and_(datum_aliases.c.project_id == project_id, datum_aliases.c.name == name)
    return connection.execute(datum_aliases.delete().where(mine)).rowcount > 0


def alias_history(connection: sa.Connection, project_id: str, name: str) -> list[dict[str, Any]]:
    """`{datum_id, time}` of every move, oldest first; empty for an unknown alias."""
    c = datum_aliases.c
    query = sa.select(c.history).where(c.project_id == project_id, c.name == name)
    return list(connection.execute(query).scalar_one_or_none() or [])
