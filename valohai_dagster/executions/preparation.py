"""From a submitted spec to a job: environment, inputs, variables, limits and the execution's own description.

Runs inside the service's transaction and touches no network; everything that is wrong is found here, before
anything is queued, and said in one refusal.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from valohai_agent.protocol import Job
from valohai_dagster.data.outside import note_versions
from valohai_dagster.data.resolve import ResolvedInputs, Source, resolve_inputs
from valohai_dagster.data.secrets import (
    SecretKey,
    Variable,
    unknown_groups,
    variable_groups,
)
from valohai_dagster.data.survey import Survey
from valohai_dagster.errors import RefusedError, SpecError
from valohai_dagster.executions.ledger import Created
from valohai_dagster.executions.reach import out_of_reach, unreachable, unwritable
from valohai_dagster.executions.recall import true_inputs
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.executions.trace_context import traceparent_of
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import Stores

VariablesOf = Callable[[Sequence[str]], Sequence[Variable]]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    job: Job
    sources: dict[str, Source]  # by JobFile.id: how to mint a grant for it
    asked: dict[str, str]  # by JobFile.id: the URI that it was found by
    changed: list[str]  # warnings of outside files that have changed since their last use (I-32)


def choose_group(spec: ExecutionSpec, settings: Settings) -> tuple[str, list[str]]:
    """The worker group, and a warning when the step's environment is unknown (see `unknown_environment`)."""
    try:
        return settings.group_of(spec.environment), []
    except RefusedError:
        if settings.unknown_environment == "refuse":
            raise
        text = (
            f"environment {spec.environment!r} is not known here, running in {settings.default_group!r}; "
            f"map it under [environments] in valohai.toml"
        )
        return settings.default_group, [text]


def prepare(
    conn: sa.Connection,
    spec: ExecutionSpec,
    created: Created,
    *,
    group: str,
    notices: list[str],
    settings: Settings,
    stores: Stores,
    secret_key: SecretKey,
    variables_of: VariablesOf,
    survey: Survey,
) -> Prepared:
    """`variables_of`: the variables of groups, as `variables_of_groups` has them. `survey`: what stores have answered.

    Raises `ProblemsError` or `RefusedError` with everything that is wrong.
    """
    _require_writable(spec, stores, settings)
    variables, secret_names = _variables(spec, variables_of)
    groups = spec.environment_variable_groups
    unknown = unknown_groups(conn, groups) if groups else []
    resolved = resolve_inputs(
        true_inputs(conn, spec, secret_key, project_id=created.project_id),
        connection=conn,
        stores=stores,
        group=settings.groups[group],
        project_id=created.project_id,
        survey=survey,
    )
    policy = settings.groups[group]
    resolved = _reached_packages(resolved, stores, settings, group)
    _require_reach(spec, resolved, stores, settings, group)
    files = [file for item in resolved.inputs for file in item.files]
    changed = note_versions(conn, files, execution_id=spec.execution_id, now=created.ctime)
    job = Job(
        execution_id=spec.execution_id,
        attempt=1,
        group=group,
        shard=created.shard,
        run_id=spec.run_id,
        step_key=spec.step_key,
        project_id=created.project_id,
        project_name=spec.project.name,
        step=spec.step,
        commit=spec.commit.identifier,
        archive_sha256=spec.commit.archive_sha256,
        image=spec.image,
        commands=spec.commands,
        parameters={name: value for name, value in spec.parameters.items() if value is not None},
        inputs=list(resolved.inputs),
        packages=list(resolved.packages),
        environment_variables=variables,
        secret_names=sorted(secret_names),
        execution_config=execution_config(
            spec, created, environment_of(spec, group, settings), settings.owner
        ),
        mounts=spec.mounts,
        mounts_allowed=policy.mounts_allowed,
        fail_fast=spec.fail_fast or policy.fail_fast,
        remote_debug=spec.remote_debug,
        respect_image_user=policy.respect_image_user,
        time_limit_seconds=spec.time_limit_seconds or settings.time_limit_seconds,
        no_output_timeout_seconds=spec.no_output_timeout_seconds
        or settings.no_output_timeout_seconds,
        trace=_trace(spec, settings),
        batches=True,
        notices=[*spec.warnings, *notices, *resolved.warnings, *changed, *_empty_groups(unknown)],
    )
    return Prepared(
        job=job, sources=dict(resolved.sources), asked=dict(resolved.asked), changed=changed
    )


def _reached_packages(
    resolved: ResolvedInputs, stores: Stores, settings: Settings, group: str
) -> ResolvedInputs:
    """Without packages that the group's workers could not read: their files may well be in reach."""
    policy, sources = settings.groups[group], resolved.sources
    away = {
        one.id
        for one in resolved.packages
        if (store := sources[one.id].store) is not None
        and (store not in stores or out_of_reach(store, stores, group, policy) is not None)
    }
    return replace(
        resolved,
        packages=[one for one in resolved.packages if one.id not in away],
        sources={ident: source for ident, source in sources.items() if ident not in away},
    )


def _require_writable(spec: ExecutionSpec, stores: Stores, settings: Settings) -> None:
    """Refuses a store that could not take the outputs (O-15), before the work is done."""
    problem = unwritable(spec.upload_store or settings.default_store, stores)
    if problem is not None:
        raise SpecError(
            f"step {spec.step!r} has no place for its outputs, which is named by `upload_store` at launch, else by "
            "`upload-store` of the step, by `upload_store` of the project, by `default_store` of the settings:",
            [problem],
        )


def _require_reach(
    spec: ExecutionSpec, resolved: ResolvedInputs, stores: Stores, settings: Settings, group: str
) -> None:
    """Refuses what the group's workers could not read or write, before the work is done."""
    uses = [
        (spec.upload_store or settings.default_store, "outputs"),
        (settings.log_store_name, "the log"),
        (spec.commit.archive_store, "the code archive"),
        *((s.store, "inputs") for s in resolved.sources.values() if s.store is not None),
    ]
    problems = unreachable(uses, stores, group, settings.groups[group])
    if problems:
        raise SpecError(f"step {spec.step!r} cannot run in the group {group!r}", problems)


def _empty_groups(names: Sequence[str]) -> list[str]:
    return [f"the environment variable group {name!r} is empty or unknown" for name in names]


def _trace(spec: ExecutionSpec, settings: Settings) -> dict[str, str]:
    """Only where spans are sent: user code must not hang its own below one that nobody will see."""
    if settings.spans_endpoint is None:
        return {}
    return {"traceparent": traceparent_of(spec.run_id, spec.execution_id)}


def _variables(spec: ExecutionSpec, variables_of: VariablesOf) -> tuple[dict[str, str], set[str]]:
    """K-73: groups, then the project's, then the step's and the launch's. Secret ones travel only with the grants."""
    plain: dict[str, str] = {}
    secret_names: set[str] = set()
    groups = variable_groups(spec.environment_variable_groups, spec.project.name)
    for variable in variables_of(groups):
        if variable.secret:
            secret_names.add(variable.name)
            plain.pop(variable.name, None)
        else:
            plain[variable.name] = variable.value
            secret_names.discard(variable.name)
    plain.update(spec.environment_variables)
    secret_names -= set(spec.environment_variables)
    missing = [
        n for n in spec.required_environment_variables if n not in plain and n not in secret_names
    ]
    if missing:
        raise SpecError(
            f"step {spec.step!r} needs environment variables that have no value",
            [
                f"{name}: set it at launch, or with `valohai-dagster secrets set GROUP {name}`"
                for name in missing
            ],
        )
    return plain, secret_names


def environment_of(spec: ExecutionSpec, group: str, settings: Settings) -> str:
    """The environment it really runs in: the one asked for if it is known here, else the group."""
    known = spec.environment in settings.environments or spec.environment in settings.groups
    return spec.environment if spec.environment and known else group


def execution_config(
    spec: ExecutionSpec, created: Created, environment: str, owner: str
) -> dict[str, Any]:
    """Content of execution.json, flat keys (K-36)."""
    return {
        "valohai.commit-identifier": spec.commit.identifier,
        "valohai.creator-email": "",
        "valohai.creator-id": 0,
        "valohai.creator-name": spec.creator,
        "valohai.environment-id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"environment:{environment}")),
        "valohai.environment-name": environment,
        "valohai.environment-slug": environment,
        "valohai.execution-counter": created.counter,
        "valohai.execution-ctime": created.ctime.isoformat(),
        "valohai.execution-duration": None,
        "valohai.execution-id": spec.execution_id,
        "valohai.execution-image": spec.image,
        "valohai.execution-qtime": None,
        "valohai.execution-status": "created",
        "valohai.execution-step": spec.step,
        "valohai.execution-tags": spec.tags,
        "valohai.execution-title": spec.title,
        "valohai.project-id": created.project_id,
        "valohai.project-name": f"{owner}/{spec.project.name}",
    }
