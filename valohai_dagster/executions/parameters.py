"""Parameter values of one execution: from what was given to typed values, and from those to commands."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from difflib import get_close_matches
from typing import Any

from valohai_yaml.commands import build_command
from valohai_yaml.excs import InvalidType, ValidationErrors
from valohai_yaml.objs import Step
from valohai_yaml.objs.parameter import MultipleMode, Parameter
from valohai_yaml.objs.parameter_map import ParameterMap

_FLAG_WORDS = {  # Y-38
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}


def resolve_parameters(
    step: Step,
    given: Mapping[str, Any],
    problems: list[str],
    hints: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Typed values in declaration order; parameters without a value are left out.

    An explicit None removes the default (Y-39). Defaults are cast like given values (Y-34), defaults of flags
    included (C-10). Every problem is appended in words, so that one pass finds all; `hints` add the reason for
    a missing value (Y-36) by parameter name.
    """
    for name in given:
        if name not in step.parameters:
            problems.append(unknown("parameter", name, step.parameters, step.name))
    values: dict[str, Any] = {}
    for name, parameter in step.parameters.items():
        value = given.get(name, parameter.default)
        if value is not None:
            values[name] = _cast(parameter, value, problems, default=name not in given)
        elif not parameter.optional and parameter.default is None:
            hint = (hints or {}).get(name, "give it a value")
            problems.append(f"parameter `{name}` is required and has no value: {hint}")
    return values


def _cast(parameter: Parameter, value: Any, problems: list[str], *, default: bool) -> Any:
    """The validated value, or the value as it was when a problem was noted."""
    origin = "default of parameter" if default else "parameter"
    try:
        return parameter.validate(_prepared(parameter, value))
    except ValidationErrors as errors:
        problems.extend(f"{origin} `{parameter.name}`: {error}" for error in errors)
    except InvalidType:
        problems.append(f"{origin} `{parameter.name}`: lists within lists are not allowed")
    return value


def _prepared(parameter: Parameter, value: Any) -> Any:
    """What people write for what the library takes: words for flags, text for a choice that YAML made a number."""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, date):  # an unquoted date in YAML
        value = str(value)
    if isinstance(value, Mapping) or (
        isinstance(value, list) and any(isinstance(v, Mapping) for v in value)
    ):
        raise ValidationErrors(["a mapping is not a value"])
    if parameter.type == "flag" and not isinstance(value, bool):
        return _FLAG_WORDS.get(str(value).strip().lower(), value)
    if parameter.type == "string" and parameter.choices:
        by_text = {str(choice): choice for choice in parameter.choices}
        if isinstance(value, list):
            return [v if v in parameter.choices else by_text.get(str(v), v) for v in value]
        return value if value in parameter.choices else by_text.get(str(value), value)
    return value


class _Values(ParameterMap):
    """The library's map, except that `{parameter-value:NAME}` of a list is joined text instead of a Python list."""

    def __init__(self, step: Step, values: Mapping[str, Any]) -> None:
        typed = {name: value for name, value in values.items() if value is not None}
        texts = {
            name: text_of_parameter(step.parameters[name], value)
            for name, value in typed.items()
            if name in step.parameters
        }
        super().__init__(parameters=step.parameters, values=texts)
        self._typed = typed

    def build_parameter_by_name(self, name: str) -> list[str] | None:
        value = self._typed.get(name)
        return None if value is None else self.parameters[name].format_cli(value)


def build_commands(step: Step, values: Mapping[str, Any]) -> list[str]:
    """Command items with placeholders filled, C-01..C-13; `values` are complete, no default is added.

    As `Step.build_command`, but for C-04: a `multiple` parameter's bare value is joined by its separator (spaces
    for `repeat`), and a parameter that was set to null leaves its placeholder verbatim.
    """
    special = {} if step.source_path is None else {"source-path": step.source_path}
    return build_command(step.command, _Values(step, values), special_interpolations=special)


def text_of_parameter(parameter: Parameter, value: Any) -> str:
    """The bare value as text, for `{parameter-value:...}` (C-04) and input URIs (I-04)."""
    if isinstance(value, list):
        separate = parameter.multiple == MultipleMode.SEPARATE
        return (parameter.multiple_separator if separate else " ").join(str(atom) for atom in value)
    return str(value)


def unknown(kind: str, name: str, known: Mapping[str, Any], step: str) -> str:
    """Words for a name that the step does not declare (Y-37)."""
    close = get_close_matches(name, known, n=1)
    if close:
        hint = f"did you mean `{close[0]}`?"
    elif known:
        hint = f"it has {', '.join(f'`{other}`' for other in known)}"
    else:
        hint = "it has none"
    return f"step `{step}` has no {kind} `{name}`: {hint}"
