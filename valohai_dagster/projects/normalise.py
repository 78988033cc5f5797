"""What we read more kindly, or more strictly, than the library: applied to the checked data before it is parsed.

- Durations become whole seconds; zero, signs and nonsense are errors (Y-19).
- Text that YAML 1.1 did not recognise as a number (`1e-5`) becomes one where the parameter is numeric (Y-34), so that
  bounds and choices compare.
- Plural socket names in edges become singular, with a warning (Y-103).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

from valohai_dagster.projects.durations import parse_duration
from valohai_dagster.projects.problems import Problem
from valohai_dagster.projects.yaml_text import YamlText

_PLURALS = {"inputs": "input", "outputs": "output", "parameters": "parameter", "files": "file"}
_NUMBERS = {"integer": lambda text: int(text, 10), "float": float}


def normalised(text: YamlText) -> tuple[list[Any], list[Problem]]:
    """A changed copy of the data, and what was changed or refused. The data fits the schema already."""
    data = copy.deepcopy(text.data)
    problems: list[Problem] = []
    for index, item in enumerate(data):
        step = item.get("step")
        if isinstance(step, dict):
            problems.extend(_durations(step, text, index))
            _numbers(step.get("parameters") or ())
        for kind in ("pipeline", "blueprint"):
            pipeline = item.get(kind)
            if isinstance(pipeline, dict):
                problems.extend(_sockets(pipeline, text, (index, kind)))
                _override_numbers(pipeline)
    return data, problems


def _durations(step: dict[str, Any], text: YamlText, index: int) -> Iterator[Problem]:
    for key in ("time-limit", "no-output-timeout"):
        if key not in step:
            continue
        try:
            duration = parse_duration(step[key])
        except ValueError as error:
            message = f"step `{step.get('name')}`, {key}: {error}"
            yield Problem(level="error", message=message, line=text.line((index, "step", key)))
            del step[key]
        else:
            step[key] = math.ceil(duration.total_seconds()) if duration else None


def _override_numbers(pipeline: dict[str, Any]) -> None:
    for node in pipeline.get("nodes") or ():
        override = node.get("override") if isinstance(node, dict) else None
        if isinstance(override, dict):
            _numbers(override.get("parameters") or ())


def _numbers(parameters: Any) -> None:
    for parameter in parameters:
        cast = _NUMBERS.get(parameter.get("type", "string"))
        if cast is None:
            continue
        for key in ("default", "min", "max", "choices"):
            if key in parameter:
                parameter[key] = _number(parameter[key], cast)


def _number(value: Any, cast: Any) -> Any:
    if isinstance(value, list):
        return [_number(item, cast) for item in value]
    try:
        return cast(value) if isinstance(value, str) else value
    except ValueError:
        return value  # lint says that it is none


def _sockets(pipeline: dict[str, Any], text: YamlText, path: tuple[int, str]) -> Iterator[Problem]:
    for number, edge in enumerate(pipeline.get("edges") or ()):
        for key, before in _ends(edge):
            after = _singular(before)
            if after != before:
                edge[key] = after
                message = f"pipeline `{pipeline.get('name')}`: edge socket `{before}` is read as `{after}` (Y-103)"
                place = (*path, "edges", number, key)
                line = text.line(place)
                yield Problem(level="warning", message=message, line=line, path=place)


def _ends(edge: Any) -> list[tuple[Any, Any]]:
    """Short form `[source, target]`, long form with keys (Y-101)."""
    pairs = enumerate(edge) if isinstance(edge, list) else edge.items()
    return [(key, value) for key, value in pairs if key in (0, 1, "source", "target")]


def _singular(socket: Any) -> Any:
    parts = socket.split(".", 2) if isinstance(socket, str) else []
    if len(parts) != 3 or parts[1] not in _PLURALS:
        return socket
    return ".".join((parts[0], _PLURALS[parts[1]], parts[2]))
