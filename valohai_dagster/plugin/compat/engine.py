"""What the run driver takes of Dagster's engine: its plan state machine, its events, its provenance.

Apart from the rest, since whoever only defines assets must not wait for the import of all this.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData,
)
from dagster._core.definitions.data_version import (
    DEFAULT_DATA_VERSION,
    extract_data_version_from_entry,
)
from dagster._core.events import (
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
from dagster._core.instance.ref import InstanceRef
from dagster._core.storage.compute_log_manager import CapturedLogContext
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES
from dagster._core.workspace.context import BaseWorkspaceRequestContext
from dagster._utils.error import serializable_error_info_from_exc_info
from dagster_shared.error import SerializableErrorInfo

if TYPE_CHECKING:
    from dagster import AssetKey, DataVersion

__all__ = [
    "DEFAULT_DATA_VERSION",
    "NOT_FINISHED_STATUSES",
    "ActiveExecution",
    "AssetCheckEvaluationTargetMaterializationData",
    "BaseWorkspaceRequestContext",
    "DagsterEvent",
    "DagsterEventBatchMetadata",
    "DataVersionCache",
    "EngineEventData",
    "ErrorSource",
    "ExecutionPlan",
    "ExecutionStep",
    "IPlanContext",
    "IStepContext",
    "InstanceConcurrencyContext",
    "InstanceRef",
    "RetryMode",
    "RunFailureReason",
    "SerializableErrorInfo",
    "StepDependencyConfig",
    "StepFailureData",
    "StepOutputData",
    "StepOutputHandle",
    "StepRetryData",
    "StepSuccessData",
    "TypeCheckData",
    "UserFailureData",
    "data_version_tags",
    "extract_data_version_from_entry",
    "logs_captured",
    "pool_of",
    "put_back",
    "serializable_error",
]


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


def serializable_error(error: BaseException) -> SerializableErrorInfo:
    """An exception as events hold it, with its trace."""
    info: Any = (type(error), error, error.__traceback__)
    return serializable_error_info_from_exc_info(info)
