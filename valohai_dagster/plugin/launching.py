"""From a step to the spec of its execution, and from its end to words: what op processes and the run driver share.

Nothing here needs user code or an execution context: a step is its tag, a run is Dagster's record of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dagster as dg

from valohai_dagster.errors import ProblemsError, RefusedError, SpecError, ValohaiError
from valohai_dagster.executions.spec import LaunchIds, StepConfig, build_spec
from valohai_dagster.executions.spec_model import CommitRef, ExecutionSpec
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.plugin.checks import evaluate
from valohai_dagster.plugin.config_schema import step_config, written_config
from valohai_dagster.plugin.partitions import NO_PARTITIONS, RunPartitions
from valohai_dagster.plugin.results import failure_metadata
from valohai_dagster.plugin.run_config import config_with_defaults
from valohai_dagster.plugin.step_tag import StepTag
from valohai_dagster.plugin.upstream_results import upstream_of, used_record, used_records
from valohai_dagster.plugin.versions import code_version_of
from valohai_dagster.projects.upstream import UpstreamResult, resolve_upstream

__all__ = [
    "StepFailure",
    "code_version_of",
    "config_of",
    "config_with_defaults",
    "evaluate",
    "failed",
    "failure_of",
    "spec_of",
    "upstream_of",
    "used_record",
    "used_records",
]

STDERR_LINES = 20  # of the failed command, in the failure's message


@dataclass(frozen=True, kw_only=True)
class StepFailure:
    """Why a step failed, as Dagster shows it."""

    description: str
    metadata: Mapping[str, dg.MetadataValue[Any]] = field(default_factory=dict)
    allow_retries: bool = True  # by a retry policy

    def to_dagster(self) -> dg.Failure:
        return dg.Failure(
            description=self.description,
            metadata=dict(self.metadata),
            allow_retries=self.allow_retries,
        )


def config_of(
    tag: StepTag,
    run_config: Mapping[str, Any],
    path: Sequence[str],
    *,
    resolved: Mapping[str, Any] | None = None,
) -> StepConfig:
    """What the run asks of the step at `path` (node names, outermost first).

    `run_config` is the config as written; `resolved` the same with defaults (`config_with_defaults`), which differs
    only where the job has a `config=` of its own, since defaults of the step are filled in later (`build_spec`).
    """
    given = written_config(run_config, path)
    return step_config(
        tag.step, written_config(resolved, path) if resolved is not None else given, given
    )


def spec_of(
    tag: StepTag,
    *,
    config: StepConfig,
    commit: CommitRef,
    ids: LaunchIds,
    upstream: Mapping[str, UpstreamResult | None],
    partitions: RunPartitions = NO_PARTITIONS,
    archive_warnings: Sequence[str] = (),
) -> ExecutionSpec:
    """Raises SpecError with everything that is wrong."""
    spec = build_spec(
        tag.step,
        _with_partitions(tag, config, partitions),
        commit=commit,
        ids=replace(ids, partition_key=partitions.label),
        upstream=resolve_upstream(tag.step, tag.edges, upstream),
        upload_store=tag.upload_store,
    )
    if not archive_warnings:
        return spec
    warnings = dict.fromkeys([*spec.warnings, *archive_warnings])  # both may tell of one file
    return spec.model_copy(update={"warnings": list(warnings)})


def _with_partitions(tag: StepTag, config: StepConfig, partitions: RunPartitions) -> StepConfig:
    """The partition below launch values and above everything else."""
    if partitions.label is None:
        return config
    parameters, name = dict(config.parameters), tag.partition_parameter
    if name is not None and name not in parameters:
        declared = tag.step.step.parameters.get(name)
        multiple = bool(declared is not None and declared.multiple)
        parameters[name] = partitions.parameter(multiple=multiple)
    return replace(
        config,
        parameters=parameters,
        environment_variables={**partitions.variables(), **config.environment_variables},
        tags=[*config.tags, f"partition:{partitions.label}"],
    )


def failure_of(error: ValohaiError) -> StepFailure:
    """Trying again helps only when a part was away; what was asked wrongly stays wrong."""
    metadata: dict[str, dg.MetadataValue[Any]] = {}
    if isinstance(error, ProblemsError) and error.problems:
        metadata["problems"] = dg.MetadataValue.md(
            "\n".join(f"- {problem}" for problem in error.problems)
        )
    permanent = isinstance(error, (ProblemsError, RefusedError))
    text = str(error)
    if isinstance(error, SpecError):
        text += "\nNext: correct this in the Launchpad or in valohai.yaml and launch again; nothing was started."
    return StepFailure(description=text, metadata=metadata, allow_retries=not permanent)


def failed(view: ExecutionView, stderr: Sequence[str] = ()) -> StepFailure:
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
    return StepFailure(
        description="\n".join(lines), metadata=failure_metadata(view), allow_retries=not stopped
    )


def next_step(view: ExecutionView) -> str:
    if view.status is ExecutionStatus.crashed:
        return "Next: `valohai-dagster doctor` checks workers and services; launch again when it is green."
    if view.exit_code is None:
        return "Next: fix what the reason names and launch again; `valohai-dagster doctor` checks the set-up."
    return "Next: the stdout and stderr tabs of this step have the complete log; outputs so far are kept."
