"""The only file with private Dagster imports; `tests/contract/plugin/test_compat.py` pins each of them.

A release of Dagster that moves or changes one of these breaks one named test instead of a user's run. Whatever has
a public name in `dagster` is imported from there by its user, not here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from dagster import MultiPartitionsDefinition, PartitionKeyRange, PartitionsDefinition
from dagster._config.snap import ConfigSchemaSnapshot, ConfigTypeSnap
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData,
)
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    DEFAULT_DATA_VERSION,
    extract_data_version_from_entry,
    get_input_data_version_tag,
)
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.definitions.partitions.utils import (
    MultiPartitionKey,
    get_multipartition_key_from_tags,
    get_tags_from_multi_partition_key,
)
from dagster._core.events import (
    ASSET_CHECK_EVENTS,
    ASSET_EVENTS,
    EVENT_TYPE_TO_PIPELINE_RUN_STATUS,
    DagsterEvent,
    DagsterEventBatchMetadata,
    EngineEventData,
    RunFailureReason,
)
from dagster._core.execution.context.data_version_cache import DataVersionCache
from dagster._core.execution.context.system import IPlanContext, IStepContext
from dagster._core.execution.plan.active import ActiveExecution, _pool_key_for_step
from dagster._core.execution.plan.execute_step import _build_data_version_tags
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext
from dagster._core.execution.plan.objects import (
    ErrorSource,
    StepFailureData,
    StepRetryData,
    StepSuccessData,
    TypeCheckData,
    UserFailureData,
)
from dagster._core.execution.plan.outputs import StepOutputData, StepOutputHandle
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.plan.step import ExecutionStep
from dagster._core.execution.retries import RetryMode
from dagster._core.execution.step_dependency_config import StepDependencyConfig
from dagster._core.instance.config import ConcurrencyConfig
from dagster._core.instance.ref import InstanceRef
from dagster._core.launcher.base import (
    CheckRunHealthResult,
    LaunchRunContext,
    ResumeRunContext,
    RunLauncher,
    WorkerStatus,
)
from dagster._core.run_coordinator.base import SubmitRunContext
from dagster._core.run_coordinator.queued_run_coordinator import RunQueueConfig
from dagster._core.snap import ExecutionPlanSnapshot, JobSnap
from dagster._core.storage.compute_log_manager import (
    CapturedLogContext,
    CapturedLogData,
    CapturedLogMetadata,
    CapturedLogSubscription,
    ComputeIOType,
    ComputeLogManager,
)
from dagster._core.storage.dagster_run import (
    ACTIVE_RUN_STATUSES,
    NOT_FINISHED_STATUSES,
    RunOpConcurrency,
)
from dagster._core.storage.event_log.schema import (
    AssetEventTagsTable,
    AssetKeyTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    BACKFILL_ID_TAG,
    GLOBAL_CONCURRENCY_TAG,
    MULTIDIMENSIONAL_PARTITION_PREFIX,
    PARENT_RUN_ID_TAG,
    PARTITION_NAME_TAG,
    RUN_FAILURE_REASON_TAG,
    WILL_RETRY_TAG,
)
from dagster._core.workspace.context import BaseWorkspaceRequestContext
from dagster._serdes import ConfigurableClass, ConfigurableClassData
from dagster._utils.error import serializable_error_info_from_exc_info
from dagster._utils.warnings import disable_dagster_warnings
from dagster_shared.error import SerializableErrorInfo

if TYPE_CHECKING:
    from dagster import (
        AssetExecutionContext,
        AssetKey,
        AssetObservation,
        DagsterInstance,
        DagsterRun,
        DataVersion,
        EventLogRecord,
        MetadataValue,
    )

__all__ = [
    "ACTIVE_RUN_STATUSES",
    "BACKFILL_ID_TAG",
    "CODE_VERSION_TAG",
    "DATA_VERSION_TAG",
    "DEFAULT_DATA_VERSION",
    "GLOBAL_CONCURRENCY_TAG",
    "NOT_FINISHED_STATUSES",
    "PARENT_RUN_ID_TAG",
    "ActiveExecution",
    "AssetCheckEvaluationTargetMaterializationData",
    "BaseWorkspaceRequestContext",
    "CapturedLogContext",
    "CapturedLogData",
    "CapturedLogMetadata",
    "CapturedLogSubscription",
    "CheckRunHealthResult",
    "ComputeIOType",
    "ComputeLogManager",
    "ConcurrencyConfig",
    "ConfigSchemaSnapshot",
    "ConfigTypeSnap",
    "ConfigurableClass",
    "ConfigurableClassData",
    "DagsterEvent",
    "DagsterEventBatchMetadata",
    "DataVersionCache",
    "EngineEventData",
    "ErrorSource",
    "ExecutionPlan",
    "ExecutionPlanSnapshot",
    "ExecutionStep",
    "IPlanContext",
    "IStepContext",
    "InstanceConcurrencyContext",
    "InstanceRef",
    "JobSnap",
    "LaunchRunContext",
    "LocalComputeLogManager",
    "ResumeRunContext",
    "RetryMode",
    "RunFailureReason",
    "RunLauncher",
    "RunOpConcurrency",
    "RunQueueConfig",
    "SerializableErrorInfo",
    "StepDependencyConfig",
    "StepFailureData",
    "StepOutputData",
    "StepOutputHandle",
    "StepRetryData",
    "StepSuccessData",
    "SubmitRunContext",
    "TypeCheckData",
    "UserFailureData",
    "WorkerStatus",
    "asset_partitions",
    "code_location_pin",
    "code_reference",
    "complete_event",
    "data_version_tags",
    "extract_data_version_from_entry",
    "finish_subscription",
    "get_input_data_version_tag",
    "input_partition_keys",
    "input_storage_id",
    "instance_id",
    "is_database_outage",
    "is_first_load",
    "log_key_of_event",
    "logs_captured",
    "multi_partition_tags",
    "observe",
    "parent_partitions",
    "pin_code_location",
    "pin_input",
    "pool_of",
    "pooled",
    "put_back",
    "report_engine_event",
    "serializable_error",
    "steady_schema",
    "step_key_of",
    "tagged_ops",
]

POOL_RECYCLE_SECONDS = 3600
STATEMENT_TIMEOUT_MS = 60_000


def report_engine_event(
    instance: DagsterInstance,
    run: DagsterRun,
    message: str,
    *,
    step_key: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes an ENGINE_EVENT at once, which also works while the step is being interrupted."""
    data = EngineEventData(metadata=dict(metadata or {}))
    instance.report_engine_event(message, run, data, step_key=step_key)


def instance_id(instance: DagsterInstance) -> str:
    """The id of the instance's run storage; empty for storages without one."""
    get = getattr(instance.run_storage, "get_run_storage_id", None)
    return str(get()) if get else ""


def observe(context: AssetExecutionContext, observation: AssetObservation) -> None:
    """Writes an observation of this step at once.

    A yield would do it too, but an interrupt that arrives while a generator is suspended never reaches it.
    """
    step = context.op_execution_context.get_step_execution_context()
    DagsterEvent.asset_observation(step, observation)


def step_key_of(context: AssetExecutionContext) -> str:
    return context.op_execution_context.get_step_execution_context().step.key


def input_storage_id(context: AssetExecutionContext, key: AssetKey) -> int | None:
    """Storage id of the upstream event that the engine will write into this step's provenance tags."""
    step = context.op_execution_context.get_step_execution_context()
    info = step.maybe_fetch_and_get_input_asset_version_info(key)
    return info.storage_id if info else None


def pin_input(
    context: AssetExecutionContext,
    key: AssetKey,
    records: Sequence[EventLogRecord],
    *,
    partitioned: bool = False,
) -> None:
    """Makes the engine record these as the version of that upstream asset that this step used.

    Without it the tags would name the newest materialization even when the run's own, or its parent run's, was
    used; the asset would then look fresh though it is not (DAGSTER_NOTES 11). Of partitions the engine takes the
    digest of all versions, and of their events the newest.
    """
    from dagster import DataVersion
    from dagster._core.execution.context.data_version_cache import InputAssetVersionInfo

    newest = max(records, key=lambda record: record.storage_id)
    version = extract_data_version_from_entry(newest.event_log_entry)
    if partitioned:
        ordered = sorted(records, key=lambda record: record.partition_key or "")
        versions = [extract_data_version_from_entry(record.event_log_entry) for record in ordered]
        text = "".join(found.value for found in versions if found is not None)
        version = DataVersion(hashlib.sha256(text.encode()).hexdigest())
    event = newest.event_log_entry.dagster_event
    known = context.op_execution_context.get_step_execution_context().input_asset_records
    assert event is not None
    assert isinstance(known, dict)
    known[key] = InputAssetVersionInfo(
        newest.storage_id, event.event_type, version, newest.run_id, newest.timestamp
    )


def input_partition_keys(context: AssetExecutionContext, key: AssetKey) -> list[str] | None:
    """Partitions of that upstream asset that this step depends on, sorted; None when it has no partitions."""
    step = context.op_execution_context.get_step_execution_context()
    name = step.job_def.asset_layer.get_node_input_name(step.node_handle, key)
    if name is None or not step.has_asset_partitions_for_input(name):
        return None
    return sorted(step.asset_partitions_subset_for_input(name).get_partition_keys())


def pin_code_location(name: str, value: str) -> None:
    """Remembers a fact of this load of the code location for the processes that load it again for a run."""
    from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext

    if is_first_load():
        DefinitionsLoadContext.get().add_to_pending_reconstruction_metadata(name, value)


def is_first_load() -> bool:
    """Whether a code server loads definitions now, and not the process of a run that loads them again."""
    from dagster._core.definitions.definitions_load_context import (
        DefinitionsLoadContext,
        DefinitionsLoadType,
    )

    if not DefinitionsLoadContext.is_set():
        return False
    return DefinitionsLoadContext.get().load_type == DefinitionsLoadType.INITIALIZATION


def code_location_pin(name: str) -> str | None:
    """What the code server remembered under that name; None there itself, and outside code locations."""
    from dagster._core.definitions.definitions_load_context import (
        DefinitionsLoadContext,
        DefinitionsLoadType,
    )

    if not DefinitionsLoadContext.is_set():
        return None
    load = DefinitionsLoadContext.get()
    if load.load_type != DefinitionsLoadType.RECONSTRUCTION:
        return None
    value = load.reconstruction_metadata.get(name)
    return value if isinstance(value, str) else None


def finish_subscription(subscription: CapturedLogSubscription) -> None:
    """Ends an open log view whose last chunk was delivered.

    Its reader looks at `is_complete` only after a chunk: set before the last one it could leave too early, set
    after it, it would wait for ever. So an empty chunk follows.
    """
    subscription.complete()
    observer = subscription._observer
    if observer is not None:
        observer(CapturedLogData(subscription.log_key, cursor=subscription._cursor))


def code_reference(path: str, line: int | None) -> MetadataValue[Any]:
    """Where the UI says that an asset is defined. Beta in Dagster, which warns of it once per asset otherwise."""
    from dagster import CodeReferencesMetadataValue, LocalFileCodeReference

    with disable_dagster_warnings():
        reference = LocalFileCodeReference(file_path=path, line_number=line)
        return CodeReferencesMetadataValue(code_references=[reference])


def tagged_ops(instance: DagsterInstance, run: DagsterRun | None, tag: str) -> frozenset[str]:
    """Names of the run's ops that carry the tag, from the snapshot, so without user code."""
    if run is None or run.job_snapshot_id is None:
        return frozenset()
    snapshot = instance.get_job_snapshot(run.job_snapshot_id)
    return frozenset(op.name for op in snapshot.node_defs_snapshot.op_def_snaps if tag in op.tags)


def log_key_of_event(run_id: str, file_key: str) -> Sequence[str]:
    """Compute-log key of a LOGS_CAPTURED event (`ComputeLogManager.build_log_key_for_run`)."""
    return [run_id, "compute_logs", file_key]


# -- for the run driver ---------------------------------------------------------------------------------------------


def logs_captured(
    context: IPlanContext, step_key: str, log_key: Sequence[str], links: Mapping[str, str]
) -> None:
    """LOGS_CAPTURED of one step; `links` are the addresses of its streams where Dagster cannot read them itself."""
    DagsterEvent.capture_logs(
        context,
        [step_key],
        log_key,
        CapturedLogContext(
            list(log_key),
            external_stdout_url=links.get("stdout"),
            external_stderr_url=links.get("stderr"),
        ),
    )


def pooled(instance: DagsterInstance, connections: int) -> None:
    """Keeps connections to Postgres open; the storages open one per statement otherwise (DAGSTER_NOTES 9)."""
    from sqlalchemy import event
    from sqlalchemy.pool import NullPool

    for storage in (instance.run_storage, instance.event_log_storage):
        engine = getattr(storage, "_engine", None)
        if engine is None or not isinstance(engine.pool, NullPool):
            continue
        from dagster_postgres.utils import create_pg_engine, set_pg_statement_timeout

        options = engine.url.query.get("options")
        pool = create_pg_engine(
            getattr(storage, "postgres_url"),  # noqa: B009
            getattr(storage, "_token_provider", None),
            isolation_level="AUTOCOMMIT",
            pool_size=connections,
            max_overflow=connections,
            pool_recycle=POOL_RECYCLE_SECONDS,
            pool_pre_ping=False,
            **({"connect_args": {"options": options}} if options else {}),
        )
        event.listen(
            pool, "connect", lambda c, _: set_pg_statement_timeout(c, STATEMENT_TIMEOUT_MS)
        )
        setattr(storage, "_engine", pool)  # noqa: B010


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


def complete_event(instance: DagsterInstance, record: EventLogRecord) -> None:
    """Does what storing an event does after its log row, as far as that is still to be done.

    Storing is several commits (DAGSTER_NOTES 9); a process that was killed between them leaves an event that the log
    shows, but neither the asset's page nor the run's status.
    """
    entry = record.event_log_entry
    event = entry.dagster_event
    if event is None:
        return
    if event.event_type in ASSET_EVENTS and event.asset_key:
        _complete_asset_event(instance.event_log_storage, record)
    if event.event_type in ASSET_CHECK_EVENTS:
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


def pool_of(step: ExecutionStep) -> str | None:
    """The pool whose slot the step needs; older code locations wrote it as a tag."""
    return _pool_key_for_step(step)


def put_back(active: ActiveExecution, keep: Collection[str]) -> list[ExecutionStep]:
    """After a replay: steps that are in flight without being in `keep` become executable again.

    A replay takes every step that could run; which of them really began is for the caller to say. Returns those kept.
    """
    for key in sorted(active._in_flight - set(keep)):
        active._in_flight.discard(key)
        active._executable.append(key)
    return [active.get_step_by_key(key) for key in sorted(active._in_flight)]


def data_version_tags(
    version: DataVersion, code_version: str, inputs: Mapping[AssetKey, Any]
) -> dict[str, str]:
    """Provenance tags of a materialization whose data version the step itself gave.

    `inputs`: per parent asset `data_version` (DataVersion) and `storage_id` (int or None).
    """
    return _build_data_version_tags(version, code_version, inputs, True)


def multi_partition_tags(partition: str | None) -> dict[str, str]:
    """Tags that name the dimensions of a key of several dimensions; none for other keys."""
    if isinstance(partition, MultiPartitionKey):
        return dict(get_tags_from_multi_partition_key(partition))
    return {}


def serializable_error(error: BaseException) -> SerializableErrorInfo:
    """An exception as events hold it, with its trace."""
    info: Any = (type(error), error, error.__traceback__)
    return serializable_error_info_from_exc_info(info)


def asset_partitions(
    instance: DagsterInstance, run: DagsterRun, graph: Any, key: AssetKey
) -> Sequence[str]:
    """Partition keys of an asset that the run makes, by its tags: one, a range, or none."""
    definition = graph.get(key).partitions_def if graph.has(key) else None
    if definition is None:
        return []
    tags = run.tags
    with partition_loading_context(dynamic_partitions_store=instance):
        if any(tag.startswith(MULTIDIMENSIONAL_PARTITION_PREFIX) for tag in tags):
            return [get_multipartition_key_from_tags(tags)]
        if PARTITION_NAME_TAG in tags:
            return [_typed_key(definition, tags[PARTITION_NAME_TAG])]
        if ASSET_PARTITION_RANGE_START_TAG in tags:
            start, end = tags[ASSET_PARTITION_RANGE_START_TAG], tags[ASSET_PARTITION_RANGE_END_TAG]
            keys = PartitionKeyRange(_typed_key(definition, start), _typed_key(definition, end))
            return definition.get_partition_keys_in_range(keys)
    return []


def _typed_key(definition: PartitionsDefinition, text: str) -> str:
    if isinstance(definition, MultiPartitionsDefinition):
        return definition.get_partition_key_from_str(text)
    return text


def parent_partitions(
    instance: DagsterInstance, graph: Any, key: AssetKey, parent: AssetKey, keys: Sequence[str]
) -> Sequence[str] | None:
    """Partitions of `parent` that these partitions of `key` depend on; None when it has no partitions."""
    if not graph.has(parent) or graph.get(parent).partitions_def is None:
        return None
    upstream, own = graph.get(parent).partitions_def, graph.get(key).partitions_def
    mapping = graph.get_partition_mapping(key, parent)
    with partition_loading_context(dynamic_partitions_store=instance):
        subset = own.subset_with_partition_keys(keys) if own is not None else None
        found = mapping.get_upstream_mapped_partitions_result_for_partitions(subset, own, upstream)
        return list(found.partitions_subset.get_partition_keys())
