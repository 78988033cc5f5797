"""The compute function of a step's asset: hand one execution over, follow it, turn its end into a result.

It owns nothing. The execution id is a function of instance, run, step and retry, so a process that dies and is
started again re-attaches to the execution that went on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
from dagster import AssetExecutionContext, DagsterEventType

from valohai_dagster.errors import (
    ProblemsError,
    RefusedError,
    SpecError,
    ValohaiError,
)
from valohai_dagster.executions.spec import LaunchIds, build_spec
from valohai_dagster.executions.spec_model import ExecutionSpec, execution_id_of
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.plugin.backend import Backend, open_backend
from valohai_dagster.plugin.compat import (
    CODE_VERSION_TAG,
    instance_id,
    log_key_of_event,
    step_key_of,
)
from valohai_dagster.plugin.compute_logs import current_log_key
from valohai_dagster.plugin.config_schema import step_config, written_config
from valohai_dagster.plugin.following import follow_to_end
from valohai_dagster.plugin.results import failure_metadata, materialize_result
from valohai_dagster.plugin.step_tag import edges_into
from valohai_dagster.plugin.upstream_results import upstream_results
from valohai_dagster.plugin.versions import code_version_of
from valohai_dagster.projects.project import Project, project_at
from valohai_dagster.projects.step import StepDefinition
from valohai_dagster.projects.upstream import resolve_upstream

STDERR_LINES = 20  # of the failed command, in the failure's message


@dataclass(frozen=True, kw_only=True)
class DeployedStep:
    """What one asset runs."""

    project: Project
    step: StepDefinition
    exported: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # see results.materialize_result
    open_backend: Callable[[], Backend] = open_backend


def run_step(
    context: AssetExecutionContext, deployed: DeployedStep
) -> Iterator[dg.MaterializeResult[Any]]:
    """Raises `dagster.Failure` with words for people; user errors are not retried by retry policies."""
    try:
        backend = deployed.open_backend()
        project, spec = prepare(context, deployed, backend)
        spec = rejoin(context, backend, spec)
        context.log.info(
            f"execution {spec.execution_id} of step {spec.step!r}: image {spec.image}, commit {spec.commit.identifier}"
        )
        for warning in spec.warnings:
            context.log.warning(warning)
        view = follow_to_end(context, backend, spec)
    except ValohaiError as error:
        raise failure_of(error) from error
    if view.status is not ExecutionStatus.complete:
        raise failed(view, backend.last_stderr(view.id, STDERR_LINES))
    result = materialize_result(view, exported=deployed.exported, read_small=backend.read_small)
    ran = code_version_of(project, project.step(spec.step), commit=spec.commit.identifier)
    yield result._replace(tags={**(result.tags or {}), CODE_VERSION_TAG: ran})


def prepare(
    context: AssetExecutionContext, deployed: DeployedStep, backend: Backend
) -> tuple[Project, ExecutionSpec]:
    """The project at the commit that was asked for, and the execution's spec."""
    op = context.op_execution_context
    given = written_config(context.run.run_config, op.node_handle.path)
    config = step_config(deployed.step, op.op_config, given)
    project = deployed.project
    if config.commit or config.adhoc:
        project = project_at(project, commit=config.commit, adhoc=config.adhoc)
    step = project.step(deployed.step.name)
    commit, archive_warnings = backend.publish(project)
    results = upstream_results(context, project, step.name, backend.view)
    spec = build_spec(
        step,
        config,
        commit=commit,
        ids=launch_ids(context),
        upstream=resolve_upstream(step, edges_into(project, step.name), results),
    )
    if archive_warnings:
        warnings = dict.fromkeys([*spec.warnings, *archive_warnings])  # both may tell of one file
        spec = spec.model_copy(update={"warnings": list(warnings)})
    return project, spec


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


def launch_ids(context: AssetExecutionContext) -> LaunchIds:
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
        asset_key=list(context.asset_key.path),
        creator=context.run.tags.get("dagster/user", ""),
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


def failure_of(error: ValohaiError) -> dg.Failure:
    """Trying again helps only when a part was away; what was asked wrongly stays wrong."""
    metadata: dict[str, Any] = {}
    if isinstance(error, ProblemsError) and error.problems:
        metadata["problems"] = dg.MetadataValue.md(
            "\n".join(f"- {problem}" for problem in error.problems)
        )
    permanent = isinstance(error, (ProblemsError, RefusedError))
    text = str(error)
    if isinstance(error, SpecError):
        text += "\nNext: correct this in the Launchpad or in valohai.yaml and launch again; nothing was started."
    return dg.Failure(description=text, metadata=metadata, allow_retries=not permanent)


def failed(view: ExecutionView, stderr: Sequence[str] = ()) -> dg.Failure:
    """Names the execution, the reason, how the command ended, its last words and where to look."""
    stopped = view.status is ExecutionStatus.stopped
    what = (
        "was stopped"
        if stopped
        else "crashed"
        if view.status is ExecutionStatus.crashed
        else "failed"
    )
    lines = [
        f"execution #{view.counter} of step {view.step!r} {what}: {view.reason or 'no reason was given'}"
    ]
    if view.exit_code is not None and f"exit code {view.exit_code}" not in (view.reason or ""):
        lines.append(f"The command ended with exit code {view.exit_code}.")
    if len(view.attempts) > 1:
        lines += [
            f"Attempt {a.number} on {a.worker or 'no worker'}: {a.reason or a.end or 'unknown end'}"
            for a in view.attempts
        ]
    if stderr:
        lines += ["Last lines of stderr:", *(f"    {line}" for line in stderr)]
    lines.append(next_step(view))
    return dg.Failure(
        description="\n".join(lines), metadata=failure_metadata(view), allow_retries=not stopped
    )


def next_step(view: ExecutionView) -> str:
    if view.status is ExecutionStatus.crashed:
        return "Next: `valohai-dagster doctor` checks workers and services; launch again when it is green."
    if view.exit_code is None:
        return "Next: fix what the reason names and launch again; `valohai-dagster doctor` checks the set-up."
    return "Next: the stdout and stderr tabs of this step have the complete log; outputs so far are kept."
