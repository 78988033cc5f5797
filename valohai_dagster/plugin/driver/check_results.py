"""Evaluations of the checks that are declared with a step."""

from __future__ import annotations

from collections.abc import Sequence

from dagster import AssetCheckEvaluation, AssetKey, DagsterInstance, EventLogRecord

from valohai_dagster.executions.stream import ExecutionView
from valohai_dagster.plugin.checks import MetricCheck, evaluate
from valohai_dagster.plugin.compat.engine import (
    AssetCheckEvaluationTargetMaterializationData,
)
from valohai_dagster.plugin.upstream_results import materializations_of_run


def evaluations(
    instance: DagsterInstance,
    run_id: str,
    key: AssetKey,
    checks: Sequence[MetricCheck],
    view: ExecutionView,
) -> list[AssetCheckEvaluation]:
    """One per check, aimed at the materialization that this run has just made."""
    target = _target(next(iter(materializations_of_run(instance, run_id, key)), None))
    out = []
    for check in checks:
        result = evaluate(check, view)
        out.append(
            AssetCheckEvaluation(
                asset_key=key,
                check_name=check.name,
                passed=result.passed,
                metadata=result.metadata,
                target_materialization_data=target,
                severity=result.severity,
                description=result.description,
                blocking=check.blocking,
            )
        )
    return out


def _target(
    record: EventLogRecord | None,
) -> AssetCheckEvaluationTargetMaterializationData | None:
    if record is None:
        return None
    return AssetCheckEvaluationTargetMaterializationData(
        run_id=record.run_id, storage_id=record.storage_id, timestamp=record.timestamp
    )
