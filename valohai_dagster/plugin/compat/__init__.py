"""The only package with private Dagster imports; `tests/contract/plugin/test_compat.py` pins each of them.

A release of Dagster that moves or changes one of these breaks one named test instead of a user's run. Whatever has
a public name in `dagster` is imported from there by its user, not here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dagster._config.snap import ConfigSchemaSnapshot, ConfigTypeSnap
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    extract_data_version_from_entry,
    get_input_data_version_tag,
)
from dagster._core.events import (
    DagsterEvent,
    EngineEventData,
)
from dagster._core.instance.config import ConcurrencyConfig
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
    NOT_FINISHED_STATUSES,
    RunOpConcurrency,
)
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.tags import (
    BACKFILL_ID_TAG,
    GLOBAL_CONCURRENCY_TAG,
    PARENT_RUN_ID_TAG,
)
from dagster._serdes import ConfigurableClass, ConfigurableClassData
from dagster._utils.warnings import disable_dagster_warnings

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
    "BACKFILL_ID_TAG",
    "CODE_VERSION_TAG",
    "DATA_VERSION_IS_USER_PROVIDED_TAG",
    "DATA_VERSION_TAG",
    "GLOBAL_CONCURRENCY_TAG",
    "NOT_FINISHED_STATUSES",
    "PARENT_RUN_ID_TAG",
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
    "EngineEventData",
    "ExecutionPlanSnapshot",
    "JobSnap",
    "LaunchRunContext",
    "LocalComputeLogManager",
    "ResumeRunContext",
    "RunLauncher",
    "RunOpConcurrency",
    "RunQueueConfig",
    "SubmitRunContext",
    "WorkerStatus",
    "code_location_pin",
    "code_reference",
    "disable_dagster_warnings",
    "extract_data_version_from_entry",
    "finish_subscription",
    "get_input_data_version_tag",
    "input_partition_keys",
    "input_storage_id",
    "instance_id",
    "is_first_load",
    "log_key_of_event",
    "observe",
    "pin_code_location",
    "pin_input",
    "pin_version",
    "report_engine_event",
    "step_key_of",
    "tagged_ops",
    "version_of_records",
]


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
    """The id of the instance's run storage; empty for storages without one.

    Of two callers that meet a new storage at once, each makes an id and only one of them lasts: so it is read again.
    """
    get = getattr(instance.run_storage, "get_run_storage_id", None)
    if get is None:
        return ""
    get()
    return str(get())


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
    from dagster._core.execution.context.data_version_cache import InputAssetVersionInfo

    newest = max(records, key=lambda record: record.storage_id)
    version = version_of_records(records, partitioned=partitioned)
    event = newest.event_log_entry.dagster_event
    known = context.op_execution_context.get_step_execution_context().input_asset_records
    assert event is not None
    assert isinstance(known, dict)
    known[key] = InputAssetVersionInfo(
        newest.storage_id, event.event_type, version, newest.run_id, newest.timestamp
    )


def pin_version(
    context: AssetExecutionContext, key: AssetKey, version: str, record: EventLogRecord | None
) -> None:
    """Makes the engine record that data version of the upstream asset, and the event it came with if there is one."""
    from dagster import DagsterEventType, DataVersion
    from dagster._core.execution.context.data_version_cache import InputAssetVersionInfo

    known = context.op_execution_context.get_step_execution_context().input_asset_records
    event = record.event_log_entry.dagster_event if record is not None else None
    assert isinstance(known, dict)
    known[key] = InputAssetVersionInfo(
        record.storage_id if record is not None else 0,
        event.event_type if event is not None else DagsterEventType.ASSET_OBSERVATION,
        DataVersion(version),
        record.run_id if record is not None else "",
        record.timestamp if record is not None else 0.0,
    )


def version_of_records(
    records: Sequence[EventLogRecord], *, partitioned: bool
) -> DataVersion | None:
    """The data version of these materializations of an asset: of partitions the digest of all, else the newest's."""
    from dagster import DataVersion

    if not partitioned:
        newest = max(records, key=lambda record: record.storage_id)
        return extract_data_version_from_entry(newest.event_log_entry)
    ordered = sorted(records, key=lambda record: record.partition_key or "")
    versions = [extract_data_version_from_entry(record.event_log_entry) for record in ordered]
    text = "".join(found.value for found in versions if found is not None)
    return DataVersion(hashlib.sha256(text.encode()).hexdigest())


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
