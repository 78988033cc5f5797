"""Dagster's storages: connections that stay open, outages, and the repair of an event that was stored in part."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from dagster._core.events import (
    ASSET_CHECK_EVENTS,
    ASSET_EVENTS,
    EVENT_TYPE_TO_PIPELINE_RUN_STATUS,
    DagsterEvent,
    DagsterEventType,
    RunFailureReason,
)
from dagster._core.instance.ref import InstanceRef
from dagster._core.storage.event_log.schema import (
    AssetEventTagsTable,
    AssetKeyTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._core.storage.tags import RUN_FAILURE_REASON_TAG, WILL_RETRY_TAG

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dagster import DagsterInstance, EventLogEntry, EventLogRecord

POOL_RECYCLE_SECONDS = 3600
STATEMENT_TIMEOUT_MS = 60_000


def pooled(instance: DagsterInstance, connections: int, *, overflow: int | None = None) -> None:
    """Keeps that many connections to Postgres open per storage, `overflow` more for a rush.

    The storages open one per statement, or keep a single one in webservers (DAGSTER_NOTES 9); a connection costs the
    server more than the statements of an event.
    """
    from sqlalchemy import event
    from sqlalchemy.pool import NullPool, QueuePool

    for storage in (instance.run_storage, instance.event_log_storage):
        engine = getattr(storage, "_engine", None)
        if engine is None or engine.dialect.name != "postgresql":
            continue
        if not isinstance(engine.pool, NullPool) and engine.pool.size() >= connections:
            continue
        from dagster_postgres.utils import create_pg_engine, set_pg_statement_timeout

        options = engine.url.query.get("options")
        larger = create_pg_engine(
            getattr(storage, "postgres_url"),  # noqa: B009
            getattr(storage, "_token_provider", None),
            isolation_level="AUTOCOMMIT",
            poolclass=QueuePool,
            pool_size=connections,
            max_overflow=connections if overflow is None else overflow,
            pool_recycle=POOL_RECYCLE_SECONDS,
            **({"connect_args": {"options": options}} if options else {}),
        )
        event.listen(
            larger, "connect", lambda c, _: set_pg_statement_timeout(c, STATEMENT_TIMEOUT_MS)
        )
        setattr(storage, "_engine", larger)  # noqa: B010


def steady_schema(instance: DagsterInstance) -> None:
    """Looks once whether a column or table exists, not at every statement: a schema only grows while we run."""
    questions = (
        (instance.run_storage, ("has_run_stats_index_cols", "has_backfill_id_column")),
        (instance.event_log_storage, ("_has_asset_key_col_on_connection", "has_table")),
    )
    for storage, names in questions:
        for name in names:
            ask = getattr(storage, name, None)
            if ask is not None:
                setattr(storage, name, _asked_once(ask))


def _asked_once(ask: Any) -> Any:
    yes: set[Any] = set()

    def answer(*args: Any) -> bool:
        key = args[-1] if args else None  # the name of the column or table
        if key not in yes and ask(*args):
            yes.add(key)
        return key in yes

    return answer


def is_database_outage(error: BaseException) -> bool:
    """Whether a storage call failed because its database is away or busy, so that trying again helps."""
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

    if isinstance(error, (OperationalError, InterfaceError)):
        return True
    if isinstance(error, DBAPIError):
        return error.connection_invalidated
    return type(error).__name__ == "DagsterPostgresException"  # the package is an extra


def storage_is_gone(instance: DagsterInstance) -> bool:
    """Whether the instance's SQLite files were deleted with their directory."""
    storage = instance.event_log_storage
    return isinstance(storage, SqliteEventLogStorage) and not os.path.isdir(storage._base_dir)


def reference_is_gone(reference: InstanceRef) -> bool:
    """The same of an instance that is not open: opening it would make new, empty files."""
    data = reference.local_artifact_storage_data
    sqlite = "Sqlite" in (reference.event_storage_data or data).class_name
    return sqlite and not os.path.isdir(str(data.config_dict.get("base_dir")))


def touches_log_only(entry: EventLogEntry) -> bool:
    """Whether storing the event is nothing but a row in the log: no asset, check or run status changes with it."""
    event = entry.dagster_event
    if event is None:
        return True
    touching = (ASSET_EVENTS, ASSET_CHECK_EVENTS, EVENT_TYPE_TO_PIPELINE_RUN_STATUS)
    return not event.is_job_event and all(event.event_type not in kinds for kinds in touching)


def store_together(instance: DagsterInstance, entries: Sequence[EventLogEntry]) -> None:
    """Stores events of one run that touch the log only in one statement: all of them or none, in their order."""
    storage: Any = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage):
        for entry in entries:
            instance.handle_new_event(entry)
        return
    with storage.run_connection(entries[0].run_id) as connection:
        connection.execute(storage.prepare_insert_event_batch(entries))


# What assets, checks and the states of runs are made of; everything else of an old run only tells how it went.
_LASTING = sorted(
    kind.value for kind in {*ASSET_EVENTS, *ASSET_CHECK_EVENTS, *EVENT_TYPE_TO_PIPELINE_RUN_STATUS}
)


def passing_events(
    instance: DagsterInstance, run_id: str, *, remove: bool = False
) -> tuple[int, int]:
    """Rows and bytes of a run's events that neither assets, checks nor run states need; removed if asked for.

    Storages that keep no SQL table have none.
    """
    storage = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage):
        return 0, 0
    if isinstance(storage, SqliteEventLogStorage) and not os.path.exists(
        storage.path_for_shard(run_id)
    ):
        return 0, 0
    columns = SqlEventLogStorageTable.c
    kind = columns.dagster_event_type
    mine = sa.and_(columns.run_id == run_id, sa.or_(kind.is_(None), kind.not_in(_LASTING)))
    counted = sa.select(sa.func.count(), sa.func.sum(sa.func.length(columns.event))).where(mine)
    with storage.run_connection(run_id) as connection:
        count, size = connection.execute(counted).one()
        if remove and count:
            connection.execute(SqlEventLogStorageTable.delete().where(mine))
    return int(count), int(size or 0)


def finished_runs(
    instance: DagsterInstance, after: datetime, before: datetime, limit: int
) -> list[tuple[str, datetime]]:
    """Ids of runs that ended in that time and when they changed last, in that order."""
    from dagster import DagsterRunStatus, RunsFilter

    ended = [DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED]
    found = instance.get_run_records(
        RunsFilter(statuses=ended, updated_after=after, updated_before=before),
        limit=limit,
        order_by="update_timestamp",
        ascending=True,
    )
    return [(record.dagster_run.run_id, record.update_timestamp) for record in found]


# Planned ones are written with the run, before anybody drives it.
_OF_ASSETS = (DagsterEventType.ASSET_MATERIALIZATION, DagsterEventType.ASSET_OBSERVATION)


def complete_event(instance: DagsterInstance, record: EventLogRecord) -> None:
    """Does what storing an event does after its log row, as far as that is still to be done.

    Storing is several commits (DAGSTER_NOTES 9); a process that was killed between them leaves an event that the log
    shows, but neither the asset's page nor the run's status.
    """
    entry = record.event_log_entry
    event = entry.dagster_event
    if event is None:
        return
    if event.event_type in _OF_ASSETS and event.asset_key:
        _complete_asset_event(instance.event_log_storage, record)
    if event.event_type is DagsterEventType.ASSET_CHECK_EVALUATION:
        instance.event_log_storage.store_asset_check_event(entry, record.storage_id)  # type: ignore[attr-defined]
    status = EVENT_TYPE_TO_PIPELINE_RUN_STATUS.get(event.event_type)
    run = instance.get_run_by_id(entry.run_id) if status else None
    if run is not None and run.status != status and not run.is_finished:
        when = datetime.fromtimestamp(entry.timestamp, timezone.utc)
        instance.run_storage.handle_run_event(entry.run_id, event, when)
        _tell_whether_run_retries(instance, event, entry.run_id)


def _tell_whether_run_retries(instance: DagsterInstance, event: DagsterEvent, run_id: str) -> None:
    run = instance.get_run_by_id(run_id)
    if run is None or not event.is_run_failure or not instance.run_retries_enabled:
        return
    text = run.tags.get(RUN_FAILURE_REASON_TAG)
    retries = instance._should_retry_run(run, RunFailureReason(text) if text else None)
    instance.add_run_tags(run_id, {WILL_RETRY_TAG: str(retries).lower()})


def _complete_asset_event(storage: Any, record: EventLogRecord) -> None:
    """Adds the event to the tables that span runs, unless it is there."""
    entry = record.event_log_entry
    event: Any = entry.dagster_event
    columns = SqlEventLogStorageTable.c
    with storage.index_transaction() as connection:
        event_id = record.storage_id
        if isinstance(storage, SqliteEventLogStorage):  # keeps a second copy of asset events
            where = (
                columns.run_id == entry.run_id,
                columns.dagster_event_type == event.event_type_value,
                columns.asset_key == event.asset_key.to_string(),
                columns.partition == event.partition,
            )
            if connection.execute(sa.select(columns.id).where(*where)).first() is not None:
                return
            inserted = connection.execute(storage.prepare_insert_event(entry))
            event_id = inserted.inserted_primary_key[0]
        tags = AssetEventTagsTable.c
        known = sa.select(tags.event_id).where(tags.event_id == event_id).limit(1)
        if connection.execute(known).first() is not None:
            return
        storage._store_asset_event_tags(connection, [entry], [event_id])
        key = AssetKeyTable.c.asset_key == event.asset_key.to_string()
        latest = connection.execute(
            sa.select(AssetKeyTable.c.last_materialization_timestamp).where(key)
        ).scalar()
        when = datetime.fromtimestamp(entry.timestamp, timezone.utc).replace(tzinfo=None)
        if latest is None or latest <= when:
            storage._store_asset_event(connection, entry, event_id)
