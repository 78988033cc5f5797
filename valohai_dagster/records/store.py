"""Small statements that many record modules share, the same on SQLite and Postgres."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from valohai_dagster.records.tables import facts


def insert_ignore(connection: sa.Connection, table: sa.Table, **values: Any) -> bool:
    """Inserts a row unless one with its key exists; tells whether it did."""
    statement = _insert(connection, table).values(**values).on_conflict_do_nothing()
    return connection.execute(statement).rowcount == 1


def upsert(connection: sa.Connection, table: sa.Table, **values: Any) -> None:
    """Inserts a row, or replaces the non-key columns of the one with its primary key."""
    keys = [column.name for column in table.primary_key]
    rest = {name: value for name, value in values.items() if name not in keys}
    statement = _insert(connection, table).values(**values)
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=rest))


def get_fact(connection: sa.Connection, name: str) -> Any:
    """A single value of the deployment, None when it was never set."""
    return connection.execute(sa.select(facts.c.value).where(facts.c.name == name)).scalar()


def set_fact(connection: sa.Connection, name: str, value: Any) -> None:
    upsert(connection, facts, name=name, value=value)


def _insert(connection: sa.Connection, table: sa.Table) -> Any:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table)
