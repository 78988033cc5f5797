"""How a try of a step ends in Dagster, from how its execution ended. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import dagster as dg
from dagster import AssetCheckEvaluation, AssetCheckSeverity, AssetMaterialization, EventLogEntry

from valohai_dagster.plugin.compat.engine import (
    ErrorSource,
    RetryMode,
    SerializableErrorInfo,
    UserFailureData,
)
from valohai_dagster.plugin.compat.partitions import (
    multi_partition_tags,
)
from valohai_dagster.plugin.driver.events import INTERRUPTED, StepEvents
from valohai_dagster.plugin.launching import StepFailure

RETRY_MODULES = {  # where the engine's exceptions are, as error messages show it
    "RetryRequested": "dagster._core.definitions.events",
    "RetryRequestedFromPolicy": "dagster._core.execution.plan.utils",
}


@dataclass(frozen=True, kw_only=True)
class Retries:
    """What decides whether a failed try is followed by another one."""

    policy: dg.RetryPolicy | None
    mode: RetryMode
    previous_attempts: int


def failure_entries(
    events: StepEvents, failure: StepFailure, retries: Retries
) -> list[EventLogEntry]:
    """STEP_UP_FOR_RETRY or STEP_FAILURE, as the engine decides it for a `dagster.Failure`."""
    error = SerializableErrorInfo(
        message=f"dagster._core.definitions.events.Failure: {failure.description}\n",
        stack=[],
        cls_name="Failure",
    )
    user = UserFailureData(
        label="intentional-failure",
        description=failure.description,
        metadata=dict(failure.metadata),
    )
    if retries.policy is None or not failure.allow_retries:
        return events.failure(error, user=user)
    return _retry_or_failure(events, retries, error, "RetryRequestedFromPolicy", user)


def interrupted_entries(events: StepEvents, retries: Retries) -> list[EventLogEntry]:
    """Of a step whose run is being cancelled. The engine lets a retry policy count here too, though no try follows."""
    if retries.policy is None:
        return events.failure(INTERRUPTED, source=ErrorSource.INTERRUPT)
    return _retry_or_failure(events, retries, INTERRUPTED, "RetryRequested", None)


def _retry_or_failure(
    events: StepEvents,
    retries: Retries,
    cause: SerializableErrorInfo,
    kind: str,
    user: UserFailureData | None,
) -> list[EventLogEntry]:
    policy = retries.policy
    assert policy is not None

    def error(message: str) -> SerializableErrorInfo:
        return SerializableErrorInfo(message=message, stack=[], cls_name=kind, cause=cause)

    if retries.mode.disabled:
        return events.failure(error("RetryRequested but retries are disabled"), user=user)
    if retries.previous_attempts >= policy.max_retries:
        text = f"Exceeded max_retries of {policy.max_retries}\n"
        return events.failure(error(text), user=user, source=ErrorSource.USER_CODE_ERROR)
    delay = policy.calculate_delay(retries.previous_attempts + 1)
    return events.retry(error(f"{RETRY_MODULES[kind]}.{kind}\n"), delay)


def materializations(
    key: dg.AssetKey,
    result: dg.MaterializeResult,
    tags: Mapping[str, str],
    partitions: Sequence[str],
) -> list[AssetMaterialization]:
    """One per partition that the execution made; one without partition otherwise."""
    metadata = dict(result.metadata or {})
    return [
        AssetMaterialization(
            asset_key=key,
            partition=partition,
            metadata=metadata,
            tags={**tags, **multi_partition_tags(partition)},
        )
        for partition in partitions or (None,)
    ]


def blocking_failure(
    events: StepEvents, evaluations: Sequence[AssetCheckEvaluation]
) -> list[EventLogEntry]:
    """STEP_FAILURE when a blocking check failed with severity ERROR; nothing otherwise."""
    failed = [
        one
        for one in evaluations
        if one.blocking and not one.passed and one.severity is AssetCheckSeverity.ERROR
    ]
    if not failed:
        return []
    names: dict[str, list[str]] = {}
    for one in failed:
        names.setdefault(one.asset_key.to_user_string(), []).append(one.check_name)
    listed = "\n".join(f"{key}: {','.join(checks)}" for key, checks in names.items())
    text = f"{len(failed)} blocking asset check{'s' if len(failed) > 1 else ''} failed with ERROR severity:\n{listed}"
    error = SerializableErrorInfo(
        message=f"dagster._core.errors.DagsterAssetCheckFailedError: {text}\n",
        stack=[],
        cls_name="DagsterAssetCheckFailedError",
    )
    return events.failure(error, source=ErrorSource.FRAMEWORK_ERROR)
