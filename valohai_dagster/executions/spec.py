"""From a step and what was asked for to an `ExecutionSpec`; pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from valohai_yaml.objs import Step
from valohai_yaml.objs.input import Input
from valohai_yaml.utils import listify

from valohai_agent.protocol import JobMount
from valohai_dagster.errors import SpecError
from valohai_dagster.executions.access import NOBODY, Launcher
from valohai_dagster.executions.parameters import (
    build_commands,
    resolve_parameters,
    text_of_parameter,
    unknown,
)
from valohai_dagster.executions.remote_debug import remote_debug_of
from valohai_dagster.executions.spec_model import CommitRef, ExecutionSpec, InputSpec, ProjectRef
from valohai_dagster.projects.durations import parse_duration
from valohai_dagster.projects.step import StepDefinition
from valohai_dagster.projects.upstream import NO_UPSTREAM, UpstreamValues

_IN_URI = re.compile(r"\{parameter(?:-value)?:(.+?)\}")  # I-04
_IDENTITY_VARIABLES = frozenset(  # K-73: of section 4.2, not for users to set
    {
        "VH_CONFIG_DIR",
        "VH_INPUTS_DIR",
        "VH_OUTPUTS_DIR",
        "VH_REPOSITORY_DIR",
        "VH_JOB_ID",
        "VH_EXECUTION_ID",
        "VH_PROJECT_ID",
        "VH_TASK_ID",
        "VH_PIPELINE_ID",
        "VH_PIPELINE_NODE_ID",
    }
)


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What the Launchpad gives.

    An absent name keeps the step's default; None for a parameter removes it (Y-39), a list of URIs for an input
    replaces its default and what edges bring (Y-41).
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Sequence[str] | str] = field(default_factory=dict)
    image: str | None = None
    environment: str | None = None
    upload_store: str | None = None  # O-15; None: the step's
    environment_variables: Mapping[str, str] = field(default_factory=dict)
    environment_variable_groups: Sequence[str] | None = None  # None: those of the step (Y-17)
    tags: Sequence[str] = ()
    title: str | None = None
    time_limit: int | float | str | None = None  # seconds or Y-19 text; None: the step's
    no_output_timeout: int | float | str | None = None
    priority: int = 0
    fail_fast: bool = False  # C-22
    autorestart: bool | None = None  # L-31; None: the step's
    remote_debug: Mapping[str, Any] | None = None  # port and public key (K-60)
    commit: str | None = None  # for `project_at`; build_spec itself ignores both
    adhoc: bool = False


@dataclass(frozen=True, kw_only=True)
class LaunchIds:
    """Who runs it: identifiers that go into the spec unchanged."""

    execution_id: str
    instance_id: str = ""
    run_id: str | None = None
    step_key: str | None = None
    retry_number: int = 0
    log_key: Sequence[str] | None = None
    asset_key: Sequence[str] | None = None
    partition_key: str | None = None
    launcher: Launcher = NOBODY


def build_spec(
    definition: StepDefinition,
    config: StepConfig,
    *,
    commit: CommitRef,
    ids: LaunchIds,
    upstream: UpstreamValues = NO_UPSTREAM,
    upload_store: str | None = None,
) -> ExecutionSpec:
    """Raise SpecError naming every problem at once: unknown names, bounds, missing values.

    Values come, weakest first, from the step, from the edges and from `config`. `upload_store` is the project's
    default, for a step and a launch that name none (O-15). Variables that the step requires
    (Y-51) and that have no value here are listed in the spec for the execution service, which knows the secrets.
    """
    step, problems = definition.step, list[str]()
    parameters = _parameters(step, config, upstream, problems)
    inputs = _inputs(step, config, upstream, parameters, problems)
    variables = _variables(step, config, upstream, problems)
    limits = [_seconds(step, config, key, problems) for key in ("time_limit", "no_output_timeout")]
    debug = remote_debug_of(config.remote_debug, problems)
    image = (config.image or step.image).strip()
    if not image or re.search(r"\s", image):
        problems.append(f"image {image!r} is not an image name")
    if problems:
        raise SpecError(
            f"step `{step.name}` of project `{definition.project}` cannot run:", problems
        )
    return ExecutionSpec(
        **_identity(ids),
        project=ProjectRef(name=definition.project),
        commit=commit,
        step=step.name,
        image=image,
        commands=build_commands(step, parameters),
        parameters=parameters,
        inputs=inputs,
        environment=config.environment or step.environment,
        environment_variables=variables,
        environment_variable_groups=_groups(step, config),
        required_environment_variables=_required(step, variables),
        mounts=[_mount(mount) for mount in step.mounts],
        upload_store=config.upload_store or step.upload_store or upload_store,
        time_limit_seconds=limits[0],
        no_output_timeout_seconds=limits[1],
        stop_condition=step.stop_condition,
        fail_fast=config.fail_fast,
        autorestart=bool(step.autorestart if config.autorestart is None else config.autorestart),
        remote_debug=debug,
        title=config.title,
        tags=list(dict.fromkeys(config.tags)),
        priority=config.priority,
        warnings=[
            *definition.unsupported,
            *definition.notes,
            *_defaults_in_use(config, upstream),
        ],
    )


def _identity(ids: LaunchIds) -> dict[str, Any]:
    return {
        "execution_id": ids.execution_id,
        "instance_id": ids.instance_id,
        "run_id": ids.run_id,
        "step_key": ids.step_key,
        "retry_number": ids.retry_number,
        "log_key": list(ids.log_key) if ids.log_key is not None else None,
        "asset_key": list(ids.asset_key) if ids.asset_key is not None else None,
        "partition_key": ids.partition_key,
        "creator": ids.launcher.user,
        "teams": list(ids.launcher.teams),
        "organization": ids.launcher.organization,
    }


def _parameters(
    step: Step, config: StepConfig, upstream: UpstreamValues, problems: list[str]
) -> dict[str, Any]:
    for name in step.parameters:
        if name not in config.parameters:
            problems.extend(upstream.problems.get(("parameter", name), ()))
    hints = {
        name: _materialize_first(steps)
        for (kind, name), steps in upstream.unmet.items()
        if kind == "parameter"
    }
    return resolve_parameters(step, {**upstream.parameters, **config.parameters}, problems, hints)


def _inputs(
    step: Step,
    config: StepConfig,
    upstream: UpstreamValues,
    parameters: Mapping[str, Any],
    problems: list[str],
) -> list[InputSpec]:
    """Every declared input, also those without files (K-35)."""
    problems.extend(
        unknown("input", name, step.inputs, step.name)
        for name in config.inputs
        if name not in step.inputs
    )
    specs = []
    for name, declared in step.inputs.items():
        uris = _uris(step, declared, config, upstream, parameters, problems)
        specs.append(
            InputSpec(
                name=name,
                uris=uris,
                optional=declared.optional,
                keep_directories=declared.keep_directories.value,
                filename=declared.filename,
                download=declared.download.value,
            )
        )
    return specs


def _uris(
    step: Step,
    declared: Input,
    config: StepConfig,
    upstream: UpstreamValues,
    parameters: Mapping[str, Any],
    problems: list[str],
) -> list[str]:
    """Given URIs, else edges with or instead of the defaults (P-12, P-13), else the defaults (Y-41, Y-42)."""
    target = ("input", declared.name)
    feed = upstream.inputs.get(declared.name)
    before = len(problems)

    def written(uris: Sequence[str] | str | None) -> list[str]:
        texts = [str(uri).strip() for uri in listify(uris)]
        return [_interpolated(text, declared, step, parameters, problems) for text in texts if text]

    if declared.name in config.inputs:
        uris = written(config.inputs[declared.name])
    else:
        problems.extend(upstream.problems.get(target, ()))
        if feed is None:
            uris = written(declared.default)
        elif feed.merge_mode == "append":
            uris = [*written(declared.default), *feed.uris]
        else:
            uris = list(feed.uris)
    if not uris and not declared.optional and len(problems) == before:
        problems.append(_missing_input(declared, config, upstream))
    return uris


def _missing_input(declared: Input, config: StepConfig, upstream: UpstreamValues) -> str:
    steps = upstream.unmet.get(("input", declared.name), ())
    if steps and declared.name not in config.inputs:
        return f"input `{declared.name}` has no value: {_materialize_first(steps)}"
    return f"input `{declared.name}` is required and has no value: give at least one URI (Y-41)"


def _materialize_first(steps: Sequence[str]) -> str:
    names = ", ".join(f"`{name}`" for name in steps)
    return (
        f"its upstream {names} was never materialized (Dagster forgets earlier runs when DAGSTER_HOME is not set); "
        "materialize that first, or give a value"
    )


def _defaults_in_use(config: StepConfig, upstream: UpstreamValues) -> list[str]:
    """Warnings for targets whose upstream never ran, so that a default in its place surprises nobody."""
    given = {
        "input": config.inputs,
        "parameter": config.parameters,
        "environment-variable": config.environment_variables,
    }
    return [
        f"{kind} `{name}` uses its default: its upstream {', '.join(f'`{s}`' for s in steps)} was never materialized"
        for (kind, name), steps in upstream.unmet.items()
        if name not in given[kind] and not (kind == "input" and name in upstream.inputs)
    ]


def _interpolated(
    uri: str, declared: Input, step: Step, parameters: Mapping[str, Any], problems: list[str]
) -> str:
    """I-04: the parameter's bare value, unlike in commands."""

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        if name not in step.parameters:
            words = unknown("parameter", name, step.parameters, step.name)
            problems.append(f"input `{declared.name}`, URI {uri}: {words}")
        elif name not in parameters:
            problems.append(f"input `{declared.name}`, URI {uri}: parameter `{name}` has no value")
        else:
            return text_of_parameter(step.parameters[name], parameters[name])
        return match[0]

    return _IN_URI.sub(value_of, uri)


def _variables(
    step: Step, config: StepConfig, upstream: UpstreamValues, problems: list[str]
) -> dict[str, str]:
    """Step defaults under edge values under launch values (K-73)."""
    for kind, name in upstream.problems:
        if kind == "environment-variable" and name not in config.environment_variables:
            problems.extend(upstream.problems[kind, name])
    defaults = {
        name: variable.default
        for name, variable in step.environment_variables.items()
        if variable.default is not None
    }
    merged = {**defaults, **upstream.environment_variables, **config.environment_variables}
    for name in merged:
        if not name or "=" in name or "\0" in name:
            problems.append(f"environment variable {name!r} is not a possible name")
        elif name in _IDENTITY_VARIABLES:
            problems.append(f"environment variable `{name}` is set by the platform alone (K-73)")
        elif "\0" in str(merged[name]):
            problems.append(f"environment variable `{name}` holds a NUL byte")
    return {name: str(value) for name, value in merged.items()}


def _required(step: Step, variables: Mapping[str, str]) -> list[str]:
    """Y-51: names that some other source must provide."""
    return [
        name
        for name, variable in step.environment_variables.items()
        if not variable.optional and name not in variables
    ]


def _groups(step: Step, config: StepConfig) -> list[str]:
    given = config.environment_variable_groups
    return list(step.environment_variable_groups if given is None else given)


def _seconds(step: Step, config: StepConfig, key: str, problems: list[str]) -> float | None:
    """The launch value, else the step's; None = the platform's default."""
    given = getattr(config, key)
    try:
        duration = parse_duration(given) if given is not None else getattr(step, key)
    except ValueError as error:
        problems.append(f"{key.replace('_', ' ')}: {error}")
        return None
    return duration.total_seconds() if duration else None


def _mount(mount: Any) -> JobMount:
    return JobMount(
        source=mount.source,
        destination=mount.destination,
        readonly=mount.readonly,
        type=mount.type,
        options={str(key): value for key, value in mount.options.items() if value is not None},
    )
