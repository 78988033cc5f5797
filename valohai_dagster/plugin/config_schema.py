"""The Launchpad's form of a step: a Dagster config schema, and the way back from config to `StepConfig`.

Everything a step declares is typed here; bounds, and choices that Dagster cannot express, stand in the
description and are checked when the execution is built (Y-34).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dagster import Any as Any_
from dagster import Array, Bool, Enum, EnumValue, Field, Float, Int, Map, Noneable, Shape, String
from valohai_yaml.objs.input import Input
from valohai_yaml.objs.parameter import Parameter

from valohai_dagster.data.placement import public_uri
from valohai_dagster.executions.spec import StepConfig
from valohai_dagster.projects.step import StepDefinition

_TYPES = {"integer": Int, "float": Float, "flag": Bool, "string": String}
_MISSING = object()


def config_schema(
    step: StepDefinition,
    *,
    fed: frozenset[tuple[str, str]] = frozenset(),
    partition_parameter: str | None = None,
    upload_store: str | None = None,
) -> Shape:
    """The step's schema. `fed` holds `("parameter" | "input", name)` that upstream assets may bring.
    `upload_store` is the project's default (O-15).

    A parameter or input that must have a value and has none, and that no edge feeds, is required, so the launch
    is refused before a run exists (Y-36, Y-41).
    """
    parameters = {
        p.name: parameter_field(step, p, fed=fed, is_partition=p.name == partition_parameter)
        for p in step.step.parameters.values()
    }
    inputs = {i.name: input_field(i, fed=fed) for i in step.step.inputs.values()}
    fields: dict[str, Field] = {}
    if parameters:
        fields["parameters"] = _group(parameters, "Values of the step's parameters.")
    if inputs:
        fields["inputs"] = _group(
            inputs, "URIs of the step's inputs: http(s)://, datum://, store://, file:// ..."
        )
    return Shape({**fields, **_common_fields(step, upload_store)})


def _group(fields: dict[str, Field], description: str) -> Field:
    """Without `is_required`, so that Dagster derives it and the Launchpad writes out the defaults to change."""
    return Field(Shape(fields), description=description)


def _common_fields(step: StepDefinition, upload_store: str | None) -> dict[str, Field]:
    raw = step.step
    variables = "; ".join(_variable_text(v) for v in raw.environment_variables.values())
    groups = raw.environment_variable_groups
    return {
        "image": _optional(String, f"Docker image. Default: {raw.image}"),
        "environment": _optional(
            String,
            f"Environment (worker group) to run on. Default: {raw.environment or 'the default group'}",
        ),
        "upload_store": _optional(
            String,
            f"Store of the outputs. Default: {raw.upload_store or upload_store or 'that of the deployment'}; "
            "see `valohai-dagster stores ls`.",
        ),
        "environment_variables": Field(
            Map(String, Noneable(String)),
            is_required=False,
            description="Environment variables of the command, beside the step's own"
            + (f" ({variables})" if variables else ""),
        ),
        "environment_variable_groups": Field(
            Noneable(Array(String)),
            is_required=False,
            description="Groups of secrets for the command, instead of the step's own"
            + (f" ({', '.join(groups)})" if groups else " (none)")
            + "; see `valohai-dagster secrets`.",
        ),
        **_running_fields(raw),
        "tags": Field(Array(String), is_required=False, description="Tags of the execution."),
        "title": _optional(String, "Title of the execution."),
        "commit": _optional(
            String,
            "Branch, tag or commit of the project to run instead of the loaded one; read anew with its YAML.",
        ),
        "adhoc": Field(
            Bool,
            is_required=False,
            default_value=False,
            description="Run the project's local directory as it is now, uncommitted changes included.",
        ),
    }


def _running_fields(raw: Any) -> dict[str, Field]:
    """How the command is run. Durations are checked when the execution is built (Y-19)."""
    durations = {
        "time_limit": ("Stops the command after this time", raw.time_limit),
        "no_output_timeout": (
            "Stops the command after this time without output",
            raw.no_output_timeout,
        ),
    }
    return {
        **{
            name: _optional(
                Any_,
                f"{words}: seconds, or text such as `1h 30m`. Default: {default or 'that of the deployment'}.",
            )
            for name, (words, default) in durations.items()
        },
        "priority": Field(
            Int,
            is_required=False,
            description="Place in the queue: higher runs before lower. Default: 0.",
        ),
        "autorestart": _optional(
            Bool,
            "Another execution continues this one when the machine is reclaimed (L-31), with the outputs so far in "
            f"the input `_restart`. Default: {bool(raw.autorestart)}.",
        ),
        "fail_fast": Field(
            Bool,
            is_required=False,
            description="End at the first command that fails instead of running all (C-22). Default: that of the worker group.",
        ),
        "remote_debug": _optional(
            Shape(
                {
                    "port": Field(Int, description="Port of the worker, above 1023."),
                    "key": Field(String, description="Your public key: `ssh-ed25519 AAAA...`."),
                }
            ),
            "Opens SSH into the execution while its command runs (K-60). Keep it alive with a final `sleep 1h`.",
        ),
    }


def _optional(inner: Any, description: str) -> Field:
    return Field(Noneable(inner), is_required=False, description=description)


def _variable_text(variable: Any) -> str:
    default = f"={variable.default}" if variable.default is not None else ""
    description = f", {variable.description.strip()}" if variable.description else ""
    return f"{variable.name}{default}{description}" + ("" if variable.optional else ", required")


def parameter_field(
    step: StepDefinition,
    parameter: Parameter,
    *,
    fed: frozenset[tuple[str, str]] = frozenset(),
    is_partition: bool = False,
) -> Field:
    """One parameter; null leaves it out of the command (Y-39).

    A fed one has no default here: the Launchpad would write it out, and what is written wins over the upstream and
    over the partition key.
    """
    is_fed = is_partition or ("parameter", parameter.name) in fed
    default = _MISSING if is_fed else _valid_default(parameter)
    inner: Any = _choices(step, parameter) or _TYPES.get(parameter.type, String)
    if parameter.multiple:
        inner = Array(inner)
    optional = parameter.optional or parameter.type == "flag" or parameter.default is not None
    required = not optional and not is_fed
    origin = "the partition key" if is_partition else "an upstream asset" if is_fed else None
    description = _parameter_text(parameter, origin)
    if required:
        return Field(inner, is_required=True, description=description)
    if default is _MISSING:
        return Field(Noneable(inner), is_required=False, description=description)
    return Field(Noneable(inner), is_required=False, default_value=default, description=description)


def _valid_default(parameter: Parameter) -> Any:
    """The default cast to its type (Y-34), or _MISSING: a bad one is the project's lint problem, not a crash."""
    if parameter.default is None:
        return _MISSING
    default = parameter.default
    if parameter.type == "flag":
        return default if isinstance(default, bool) else _MISSING
    try:
        value = parameter.validate(default)
    except (ValueError, TypeError):  # the project's warnings and build_spec name it
        return _MISSING
    texts = [
        str(v) if parameter.type == "string" else v
        for v in (value if isinstance(value, list) else [value])
    ]
    return texts if parameter.multiple else texts[0]


def _choices(step: StepDefinition, parameter: Parameter) -> Enum | None:
    """Text choices become an enum; numbers stay numbers, since Dagster's enums are written as words."""
    choices = [c for c in parameter.choices or [] if isinstance(c, str) and c.strip()]
    if parameter.type != "string" or not choices or len(choices) < len(parameter.choices or []):
        return None
    if any(re.fullmatch(r"(?i)true|false|yes|no|on|off|null|~|[-+.\d].*", c) for c in choices):
        return None  # YAML in the Launchpad would read these as something else than text
    name = f"{step.project}_{step.name}_{parameter.name}"
    digest = hashlib.sha256("\0".join([name, *choices]).encode()).hexdigest()[:8]
    return Enum(
        name=re.sub(r"\W", "_", name) + f"_{digest}",
        enum_values=[EnumValue(choice, python_value=choice) for choice in choices],
    )


def _parameter_text(parameter: Parameter, origin: str | None) -> str:
    parts = [parameter.description.strip() if parameter.description else ""]
    bounds = [f"at least {parameter.min}"] if parameter.min is not None else []
    bounds += [f"at most {parameter.max}"] if parameter.max is not None else []
    parts.append(", ".join(bounds).capitalize())
    if parameter.choices:
        parts.append("One of: " + ", ".join(str(c) for c in parameter.choices))
    if parameter.category:
        parts.append(f"Category: {parameter.category}")
    if parameter.multiple:
        parts.append(f"Several values ({parameter.multiple.value})")
    if origin:
        parts.append(f"Comes from {origin} unless given here")
    if parameter.default is not None:
        parts.append(f"Default: {parameter.default}")
    return _sentences(parts)


def _sentences(parts: list[str]) -> str:
    return " ".join(
        part if part.endswith((".", "!", "?")) else f"{part}." for part in parts if part
    )


def input_field(item: Input, *, fed: frozenset[tuple[str, str]] = frozenset()) -> Field:
    """One input: a list of URIs, which replaces the default list entirely (Y-41). For fed ones see `parameter_field`."""
    defaults = _shown_uris(item)
    is_fed = ("input", item.name) in fed
    parts = [item.description.strip() if item.description else ""]
    if is_fed:
        parts.append("Files come from an upstream asset unless URIs are given here")
    if item.optional:
        parts.append("Optional")
    if is_fed and defaults:
        parts.append("Default: " + ", ".join(defaults))
    description = _sentences(parts) or None
    if defaults and not is_fed:
        return Field(
            Array(String), is_required=False, default_value=defaults, description=description
        )
    required = not item.optional and not is_fed
    return Field(Array(String), is_required=required, description=description)


def default_uris(item: Input) -> list[str]:
    default = item.default
    if not default:
        return []
    return [str(default)] if isinstance(default, str) else [str(uri) for uri in default]


def step_config(
    step: StepDefinition, config: Mapping[str, Any] | None, given: Mapping[str, Any] | None = None
) -> StepConfig:
    """`StepConfig` from the op's resolved config.

    Dagster fills in the schema's defaults, but a default is not a choice: an upstream asset and another commit's
    YAML must be able to replace it. So a value that equals the default counts only when it stands in `given`, the
    config as the user wrote it.
    """
    config, given = config or {}, given or {}
    written_parameters, written_inputs = given.get("parameters") or {}, given.get("inputs") or {}
    parameters = {
        name: value
        for name, value in (config.get("parameters") or {}).items()
        if name in written_parameters or value != _default_of(step, name)
    }
    inputs = {
        name: _true_uris(step, name, value)
        for name, value in (config.get("inputs") or {}).items()
        if name in written_inputs or value != _default_uris_of(step, name)
    }
    variables = config.get("environment_variables") or {}
    return StepConfig(
        parameters=parameters,
        inputs=inputs,
        image=config.get("image"),
        environment=config.get("environment"),
        upload_store=config.get("upload_store"),
        environment_variables={k: v for k, v in variables.items() if v is not None},
        environment_variable_groups=config.get("environment_variable_groups"),
        time_limit=config.get("time_limit"),
        no_output_timeout=config.get("no_output_timeout"),
        priority=config.get("priority") or 0,
        fail_fast=bool(config.get("fail_fast")),
        autorestart=config.get("autorestart"),
        remote_debug=config.get("remote_debug"),
        tags=tuple(config.get("tags") or ()),
        title=config.get("title"),
        commit=config.get("commit"),
        adhoc=bool(config.get("adhoc")),
    )


def _default_of(step: StepDefinition, name: str) -> Any:
    parameter = step.step.parameters.get(name)
    return _MISSING if parameter is None else _valid_default(parameter)


def _default_uris_of(step: StepDefinition, name: str) -> Any:
    item = step.step.inputs.get(name)
    return _MISSING if item is None else _shown_uris(item)


def _shown_uris(item: Input) -> list[str]:
    """The defaults without credentials: Dagster keeps schemas, and the Launchpad writes defaults into configs."""
    return [public_uri(uri) for uri in default_uris(item)]


def _true_uris(step: StepDefinition, name: str, uris: Sequence[str]) -> list[str]:
    """A default that came back as it was shown is the true one again."""
    item = step.step.inputs.get(name)
    true = {public_uri(uri): uri for uri in default_uris(item)} if item is not None else {}
    return [true.get(uri, uri) for uri in uris]


def written_config(run_config: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    """The op's config as written in the run's config, empty if it is not there. `path`: node names, outermost first."""
    node: Any = (
        {"ops": run_config.get("ops") or run_config.get("solids")}
        if isinstance(run_config, Mapping)
        else {}
    )
    for name in path:
        children = node.get("ops") if isinstance(node, Mapping) else None
        node = children.get(name) if isinstance(children, Mapping) else None
    config = node.get("config") if isinstance(node, Mapping) else None
    return config if isinstance(config, Mapping) else {}


__all__ = [
    "config_schema",
    "default_uris",
    "input_field",
    "parameter_field",
    "step_config",
    "written_config",
]
