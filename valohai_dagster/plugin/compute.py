"""The compute function of a step's asset: hand one execution over, follow it, turn its end into a result.

It owns nothing. The execution id is a function of instance, run, step and retry, so a process that dies and is
started again re-attaches to the execution that went on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg
from dagster import AssetExecutionContext, AssetKey, DagsterEventType, EventLogRecord

from valohai_dagster.errors import SpecError, ValohaiError
from valohai_dagster.executions.access import launcher_of
from valohai_dagster.executions.spec import LaunchIds, StepConfig
from valohai_dagster.executions.spec_model import ExecutionSpec, execution_id_of
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.plugin.backend import Backend, open_backend
from valohai_dagster.plugin.checks import evaluate
from valohai_dagster.plugin.compat import (
    CODE_VERSION_TAG,
    input_partition_keys,
    input_storage_id,
    instance_id,
    log_key_of_event,
    observe,
    pin_input,
    pin_version,
    step_key_of,
)
from valohai_dagster.plugin.compute_logs import current_log_key
from valohai_dagster.plugin.config_schema import step_config, written_config
from valohai_dagster.plugin.following import follow_to_end
from valohai_dagster.plugin.launching import (
    STDERR_LINES,
    code_version_of,
    failed,
    failure_of,
    spec_of,
    upstream_of,
    used_record,
    used_records,
)
from valohai_dagster.plugin.partitions import NO_PARTITIONS, RunPartitions
from valohai_dagster.plugin.results import materialize_result
from valohai_dagster.plugin.step_tag import StepTag, tag_at
from valohai_dagster.plugin.upstream_results import latest_ids
from valohai_dagster.plugin.used_inputs import unseen, used_sources, used_upstream
from valohai_dagster.projects.project import Project, project_at


@dataclass(frozen=True, kw_only=True)
class DeployedStep:
    """What one asset runs."""

    project: Project
    tag: StepTag
    open_backend: Callable[[], Backend] = open_backend


def run_step(
    context: AssetExecutionContext, deployed: DeployedStep
) -> Iterator[dg.MaterializeResult[Any]]:
    """Raises `dagster.Failure` with words for people; user errors are not retried by retry policies."""
    try:
        backend = deployed.open_backend()
        tag, spec = prepare(context, deployed, backend)
        spec = rejoin(context, backend, spec)
        context.log.info(
            f"execution {spec.execution_id} of step {spec.step!r}: image {spec.image}, commit {spec.commit.identifier}"
        )
        for warning in spec.warnings:
            context.log.warning(warning)
        view = follow_to_end(context, backend, spec)
    except ValohaiError as error:
        raise failure_of(
            error
        ).to_dagster() from None  # a cause would only show the same text again
    if view.status is not ExecutionStatus.complete:
        raise failed(view, backend.last_stderr(view.id, STDERR_LINES)).to_dagster()
    _record_used_inputs(context, tag, view, backend)
    result = materialize_result(view, exported=tag.exported, read_small=backend.read_small)
    ran = code_version_of(tag.step, spec.commit.identifier)
    yield result._replace(
        tags={**(result.tags or {}), CODE_VERSION_TAG: ran},
        check_results=[evaluate(check, view) for check in tag.checks],
    )


def _record_used_inputs(
    context: AssetExecutionContext, tag: StepTag, view: ExecutionView, backend: Backend
) -> None:
    """Provenance of what was really used, where that is not the newest of what this step depends on."""
    instance = context.instance
    for observation in unseen(instance, tag, view):
        observe(context, observation)
    used = used_upstream(
        instance,
        tag,
        view,
        backend.origins,
        given=_config(context, tag).inputs,
        partitioned=lambda key: input_partition_keys(context, key) is not None,
    )
    for one in [*used_sources(instance, tag, view), *used]:
        pin_version(context, one.key, one.version, one.record)


def prepare(
    context: AssetExecutionContext, deployed: DeployedStep, backend: Backend
) -> tuple[StepTag, ExecutionSpec]:
    """The step at the commit that was asked for, and the execution's spec."""
    tag, project = deployed.tag, deployed.project
    config = _config(context, tag)
    if config.commit or config.adhoc:
        project = project_at(project, commit=config.commit, adhoc=config.adhoc)
        tag = tag_at(tag, project)
    commit, archive_warnings = backend.publish(project)
    told: list[str] = []
    try:
        upstream = upstream_of(
            tag,
            lambda key: used_materializations(context, key, told.append),
            backend.view,
            told.append,
        )
        spec = spec_of(
            tag,
            config=config,
            commit=commit,
            ids=launch_ids(context, tag),
            partitions=partitions_of(context),
            upstream=upstream,
            archive_warnings=[*told, *archive_warnings],
        )
    except ValohaiError:
        for text in told:  # they may explain it
            context.log.warning(text)
        raise
    return tag, spec


def _config(context: AssetExecutionContext, tag: StepTag) -> StepConfig:
    op = context.op_execution_context
    given = written_config(context.run.run_config, op.node_handle.path)
    return step_config(tag.step, op.op_config, given)


def partitions_of(context: AssetExecutionContext) -> RunPartitions:
    """What this step makes; a run for a partition may hold steps without partitions too."""
    if context.assets_def.partitions_def is None:
        return NO_PARTITIONS
    if not (context.has_partition_key or context.has_partition_key_range):
        raise SpecError(
            f"asset {context.asset_key.to_user_string()} has partitions, and the run names none of them",
            ["choose a partition when you launch it"],
        )
    return RunPartitions.of_keys(context.partition_keys)


def used_materializations(
    context: AssetExecutionContext, key: AssetKey, warn: Callable[[str], None]
) -> list[EventLogRecord]:
    """What this step uses of an upstream asset; the engine's provenance tags are told about it."""
    partition_keys = input_partition_keys(context, key)
    if partition_keys is not None:
        return _used_partitions(context, key, partition_keys, warn)
    latest_id = input_storage_id(context, key)
    record = used_record(context.instance, context.run, key, latest_id)
    if record is None:
        return []
    if record.storage_id != latest_id:
        pin_input(context, key, [record])
    return [record]


def _used_partitions(
    context: AssetExecutionContext,
    key: AssetKey,
    partition_keys: list[str],
    warn: Callable[[str], None],
) -> list[EventLogRecord]:
    instance = context.instance
    records = used_records(instance, context.run, key, partition_keys, warn)
    newest = set(latest_ids(instance, key, partition_keys).values())
    if any(record.storage_id not in newest for record in records):
        pin_input(context, key, records, partitioned=True)
    return records


def rejoin(context: AssetExecutionContext, backend: Backend, spec: ExecutionSpec) -> ExecutionSpec:
    """The same spec, for the execution that an earlier, dead process of this step has left behind if there is one."""
    parent = context.run.parent_run_id
    left_behind = backend.rejoinable(spec, [parent] if parent else [])
    if left_behind is None:
        return spec
    context.log.info(
        f"going on with execution {left_behind}, which an earlier process of this step has started"
    )
    return spec.model_copy(update={"execution_id": left_behind})


def launch_ids(context: AssetExecutionContext, tag: StepTag) -> LaunchIds:
    """The same for every process that works on this try of the step."""
    step_key, instance = step_key_of(context), instance_id(context.instance)
    run_id, retry = context.run.run_id, context.retry_number
    return LaunchIds(
        execution_id=execution_id_of(instance, run_id, step_key, retry),
        instance_id=instance,
        run_id=run_id,
        step_key=step_key,
        retry_number=retry,
        log_key=log_key(context, step_key),
        asset_key=list(tag.asset_key),
        launcher=launcher_of(context.run.tags),
    )


def log_key(context: AssetExecutionContext, step_key: str) -> Sequence[str] | None:
    """Where the UI looks for this step's log: known here under our log manager, else read from the event log."""
    run_id = context.run.run_id
    known = current_log_key(run_id)
    if known is not None:
        return known
    records = context.instance.get_records_for_run(
        run_id, of_type=DagsterEventType.LOGS_CAPTURED, ascending=False
    ).records
    for record in records:
        event = record.event_log_entry.dagster_event
        data: Any = event.event_specific_data if event else None
        if data is not None and step_key in (data.step_keys or ()):
            return log_key_of_event(run_id, data.file_key)
    return None
