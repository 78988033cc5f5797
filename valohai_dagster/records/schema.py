"""Bringing the schema up to date; alembic is only imported when there is something to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from valohai_dagster.errors import ConfigurationError

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0008"
VERSION_TABLE = "vh_alembic_version"  # Dagster's own is `alembic_version`, in the same database
_LOCK = 0x7668_7265_63  # Postgres advisory lock of this package ("vhrec")


def migrate(connection: sa.Connection) -> None:
    """Moves the schema to HEAD inside the caller's write transaction, one process at a time.

    SQLite's write lock is held already; Postgres takes an advisory lock that ends with the transaction.
    """
    if connection.dialect.name == "postgresql" and current_revision(connection) == HEAD:
        return
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    if current_revision(connection) != HEAD:
        _upgrade(connection)


def current_revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    version = sa.table(VERSION_TABLE, sa.column("version_num"))
    return connection.execute(sa.select(version.c.version_num)).scalar()


def alembic_config(connection: sa.Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option(
        "script_location", str(Path(__file__).parent / "migrations").replace("%", "%%")
    )
    config.attributes["connection"] = connection
    return config


def _upgrade(connection: sa.Connection) -> None:
    from alembic import command
    from alembic.util import CommandError

    try:
        command.upgrade(alembic_config(connection), "head")
    except CommandError as error:
        raise ConfigurationError(
            f"the records have the schema version {current_revision(connection)!r}, which this release (up to {HEAD}) "
            "does not know: a newer release has migrated them. Upgrade valohai-dagster, or restore a backup"
        ) from error
