"""Opening the records: engine, schema version, and the two kinds of transaction.

SQLite runs in WAL mode; a writer takes the write lock when its transaction begins, so that two processes wait
for each other (30 s) instead of failing half way. Never make network calls inside a transaction.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from valohai_agent.redis_url import redact
from valohai_dagster.errors import ConfigurationError, RecordsUnavailable
from valohai_dagster.records.schema import migrate
from valohai_dagster.records.store import get_fact, insert_ignore
from valohai_dagster.records.tables import facts
from valohai_dagster.settings import Settings

SQLITE_BUSY_SECONDS = 30.0
POSTGRES_CONNECT_SECONDS = 10
TRUST_SECONDS = 5.0  # a connection that was used within this time is taken for alive
_WRITES = "vh_writes"
_USED_AT = "vh_used_at"


@dataclass(frozen=True, kw_only=True)
class Records:
    """An open database with the current schema. Threads may share it; processes open their own."""

    engine: sa.Engine
    deployment_id: str
    shards: int  # into how many parts runs and executions are divided; fixed for the deployment

    def shard_of(self, key: str) -> int:
        """The shard of a run, or of an execution without one, by its id."""
        return zlib.crc32(key.encode()) % self.shards

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection for reading; what it sees does not change while it lasts on SQLite."""
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction: committed at the end, rolled back on an error. Keep it short."""
        with _transaction(self.engine) as connection:
            yield connection

    def close(self) -> None:
        self.engine.dispose()


@contextmanager
def _transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection:
        connection = connection.execution_options(**{_WRITES: True})
        with connection.begin():
            yield connection


def open_records(settings: Settings) -> Records:
    """Opens the records, bringing the schema up to date first; safe in several processes at once.

    Raises `RecordsUnavailable` when the database cannot be reached or written, and `ConfigurationError` for a URL
    that makes no sense, a missing driver, or a schema that a newer release has made.
    """
    engine = make_engine(settings.records_url)
    try:
        with _transaction(engine) as connection:
            migrate(connection)
            deployment = str(_fixed(connection, "deployment_id", uuid.uuid4().hex[:12]))
            shards = int(_fixed(connection, "shards", settings.shards))
    except exc.DBAPIError as error:
        engine.dispose()
        raise RecordsUnavailable(_unavailable(settings, error)) from error
    except BaseException:
        engine.dispose()
        raise
    return Records(engine=engine, deployment_id=deployment, shards=shards)


def make_engine(url: str) -> sa.Engine:
    """An engine with this package's connection rules; opens no connection yet."""
    try:
        parsed = sa.make_url(url.replace("postgres://", "postgresql://", 1))
        backend = parsed.get_backend_name()
        if backend == "sqlite":
            return _sqlite(parsed)
        if backend == "postgresql":
            return _postgres(parsed)
    except exc.ArgumentError:
        shown = "the value" if "@" in url else repr(url)
        raise ConfigurationError(
            f"database_url: {shown} is not a database URL; "
            "expected postgresql://user:password@host:5432/name, or nothing for SQLite"
        ) from None
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"database_url: the driver {error.name!r} is not installed; install valohai-dagster[postgres]"
        ) from error
    raise ConfigurationError(
        f"database_url: {backend} is not supported; use postgresql:// or leave it unset for SQLite"
    )


def _postgres(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(
        url,
        json_serializer=dump_json,
        connect_args={"connect_timeout": POSTGRES_CONNECT_SECONDS},
        executemany_mode="values_plus_batch",
    )

    def note(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        record.info[_USED_AT] = time.monotonic()

    def test(connection: DBAPIConnection, record: ConnectionPoolEntry, proxy: object) -> None:
        """A busy process need not ask before every transaction whether the server is still there."""
        idle = time.monotonic() - record.info.get(_USED_AT, time.monotonic())
        if idle < TRUST_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise exc.InvalidatePoolError from error

    event.listen(engine, "checkin", note)
    event.listen(engine, "checkout", test)
    return engine


def _sqlite(url: sa.URL) -> sa.Engine:
    path = Path(url.database or "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordsUnavailable(
            f"cannot make the directory {path.parent} for the records: {error.strerror}; "
            "set state_dir (VALOHAI_STATE) to a directory you may write to"
        ) from error
    engine = sa.create_engine(
        url, connect_args={"timeout": SQLITE_BUSY_SECONDS}, json_serializer=dump_json
    )
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def dump_json(value: Any) -> str:
    """JSON that every database takes: NaN and the infinities, which JSON does not know, become texts."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _configure_sqlite(connection: DBAPIConnection, record: object) -> None:
    assert isinstance(connection, sqlite3.Connection)
    connection.isolation_level = (
        None  # transactions begin in _begin_sqlite, not by the driver's guess
    )
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _fixed(connection: sa.Connection, name: str, first: Any) -> Any:
    """A fact that the first process to open a new database decides for good."""
    found = get_fact(connection, name)
    if found is None:
        insert_ignore(connection, facts, name=name, value=first)
        found = get_fact(connection, name)
    return found


def _unavailable(settings: Settings, error: exc.DBAPIError) -> str:
    cause = " ".join(str(error.orig).split())
    if settings.database_url is None:
        return (
            f"the records {settings.state_dir / 'records.db'} cannot be opened: {cause}; check that the directory "
            "is yours and has space, or set state_dir (VALOHAI_STATE). `valohai-dagster doctor` checks it"
        )
    return (
        f"the records at {redact(settings.database_url)} cannot be used: {cause}; check database_url "
        "(VALOHAI_DATABASE_URL) and that the server is up. `valohai-dagster doctor` checks it"
    )
