"""valohai.yaml to the library's `Config`, with every problem placed on its line.

The rules are the library's (schema, then semantic lint); ours are the line, the hint, and that nothing in a file
can make the check itself fail (Y-06, Y-106).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from valohai_yaml.lint import LintResult
from valohai_yaml.objs import Config, Pipeline

from valohai_dagster.projects import yaml_text
from valohai_dagster.projects.items import KINDS, Path, items_of, kind_of, steps_at, value_at
from valohai_dagster.projects.normalise import normalised
from valohai_dagster.projects.problems import Level, Problem, errors_of
from valohai_dagster.projects.schema_check import schema_problems
from valohai_dagster.projects.unsupported import unsupported_keys
from valohai_dagster.projects.yaml_text import YamlText, child_of

_PARSE_ERRORS = (ValueError, TypeError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True, kw_only=True)
class CheckedConfig:
    """`config` is None when a problem of level error was found; `unsupported` are those of the problems that tell
    which keys have no effect here."""

    config: Config | None
    problems: tuple[Problem, ...] = ()
    unsupported: tuple[Problem, ...] = ()
    step_lines: dict[str, int | None] = field(default_factory=dict)


def check_config(content: bytes | str) -> CheckedConfig:
    """All problems that one pass can find: YAML, then schema, then semantics (Y-111)."""
    text = yaml_text.read(content)
    problems = list(text.problems)
    if not errors_of(problems):
        problems.extend(_shape_problems(text))
    if not errors_of(problems):
        problems.extend(schema_problems(text))
    if errors_of(problems):
        return CheckedConfig(config=None, problems=_sorted(problems))
    data, more = normalised(text)
    problems.extend(more)
    config, more = _parsed(data, text)
    problems.extend(more)
    if config is not None:
        problems.extend(_semantic_problems(config, data, text))
    without_effect = _with_steps(unsupported_keys(data, text), data)
    return CheckedConfig(
        config=None if errors_of(problems) else config,
        problems=_sorted([*_with_steps(problems, data), *without_effect]),
        unsupported=_sorted(without_effect),
        step_lines={name: text.line(path, key=True) for name, path in items_of(data, "step")},
    )


def _with_steps(problems: Iterable[Problem], data: list[Any]) -> list[Problem]:
    """Each problem tied to the steps that its place concerns."""
    return [replace(problem, steps=steps_at(data, problem.path)) for problem in problems]


def _sorted(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    return tuple(sorted(dict.fromkeys(problems), key=lambda problem: problem.line or 0))


# -- shape --------------------------------------------------------------------------------------------


def _shape_problems(text: YamlText) -> Iterator[Problem]:
    """Y-01 to Y-04: a list of mappings; unknown items are tolerated and noted."""
    hint = "start the file with `- step:` and indent the step's keys below it"
    if text.data is None:
        yield Problem(level="error", message="the file is empty", hint=hint)
    elif not isinstance(text.data, list):
        kind = "a mapping" if isinstance(text.data, dict) else "a single value"
        message = f"the file must be a list of items, it is {kind}"
        yield Problem(level="error", message=message, line=text.line(()), hint=hint)
    else:
        for index, item in enumerate(text.data):
            yield from _item_problems(item, text.line((index,)))


def _item_problems(item: Any, line: int | None) -> Iterator[Problem]:
    if not isinstance(item, dict):
        hint = "write `- step:` with the keys indented below it"
        yield Problem(
            level="error", message=f"item {item!r} is not a mapping", line=line, hint=hint
        )
        return
    known = [kind for kind in KINDS if kind in item]
    if len(known) > 1:
        names = " and ".join(f"`{kind}`" for kind in known)
        message = f"one item holds {names}; only `{known[0]}` is read (Y-04)"
        hint = "start each with its own `- `"
        yield Problem(level="warning", message=message, line=line, hint=hint)
    if not known:
        name = next(iter(item), "")
        close = get_close_matches(str(name), KINDS, n=1)
        hint = f"did you mean `{close[0]}`?" if close else None
        message = f"top-level key `{name}` has no meaning here and is skipped (Y-03)"
        yield Problem(level="warning" if close else "note", message=message, line=line, hint=hint)


# -- parsing -----------------------------------------------------------------------------------------------------


def _parsed(data: list[Any], text: YamlText) -> tuple[Config | None, list[Problem]]:
    """Each item by itself first, so that what one raises is reported with its line."""
    problems: list[Problem] = []
    for index, item in enumerate(data):
        try:
            Config.parse([item])
        except _PARSE_ERRORS as error:
            kind = kind_of(item) or ""
            name = child_of(child_of(item, kind), "name")
            message = f"{kind} `{name}` cannot be read: {_error_words(error)}"
            problems.append(
                Problem(level="error", message=message, line=text.line((index, kind), key=True))
            )
    if problems:
        return None, problems
    return Config.parse(data), _duplicates(data, text)


def _error_words(error: Exception) -> str:
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unexpected:
        return f"unknown key `{unexpected[1].replace('_', '-')}`"
    return f"missing key {error}" if isinstance(error, KeyError) else str(error)


def _duplicates(data: list[Any], text: YamlText) -> list[Problem]:
    """Y-05: the last definition wins."""
    problems, seen = [], set[tuple[str, str]]()
    for kind in KINDS:
        for name, path in items_of(data, kind):
            shared = "pipeline" if kind == "blueprint" else kind
            if (shared, name) in seen:
                message = f"{kind} `{name}` is defined again; the last definition counts (Y-05)"
                line = text.line(path, key=True)
                problems.append(Problem(level="warning", message=message, line=line, path=path))
            seen.add((shared, name))
    return problems


# -- semantics ---------------------------------------------------------------------------------------------------


def _semantic_problems(config: Config, data: list[Any], text: YamlText) -> Iterator[Problem]:
    """Each object is linted alone: one that makes the library fail costs only its own remaining checks (Y-106)."""
    groups = (
        (("step",), config.steps),
        (("task",), config.tasks),
        (("endpoint",), config.endpoints),
        (("pipeline", "blueprint"), config.pipelines),
        (("deployment",), config.deployments),
    )
    for kinds, objects in groups:
        paths = dict(items_of(data, *kinds))
        for name, obj in objects.items():
            result = LintResult()
            try:
                obj.lint(result, {"config": config})
            except _PARSE_ERRORS as error:
                _add_crash(result, obj, error)
            if isinstance(obj, Pipeline):
                yield from _action_warnings(obj, text, paths.get(name, ()))
            for found in result.messages:
                if not _ACTION_WARNING.match(found["message"]):
                    yield _placed(found, data, text, paths.get(name, ()))


def _action_warnings(pipeline: Pipeline, text: YamlText, path: Path) -> Iterator[Problem]:
    """The library's warnings about actions (Y-100) do not name the node: asked for one by one they have a place."""
    for number, node in enumerate(pipeline.nodes):
        for index, action in enumerate(node.actions):
            result = LintResult()
            action.lint(result, {})
            place = (*path, "nodes", number, "actions", index)
            for found in result.messages:
                message = (
                    f"pipeline `{pipeline.name}`, node `{node.name}`: {found['message'].strip()}"
                )
                line = text.line(place)
                yield Problem(level="warning", message=message, line=line, path=place)


def _add_crash(result: LintResult, obj: Any, error: Exception) -> None:
    """Y-106: a pipeline parameter whose node names a missing step; that error is in the result already."""
    if not (isinstance(obj, Pipeline) and isinstance(error, KeyError) and list(result.errors)):
        result.add_error(f"`{obj.name}` cannot be checked: {type(error).__name__}: {error}")


_ACTION_WARNING = re.compile(r'"(when|then)" value ')
_SEMANTIC = (  # pattern of the library's message -> where to look below the item, hint
    (r"Step .*, parameter (?P<name>.+?): default", "parameters/{name}/default", "change the default or the rule; a launch without its own value is refused"),
    (r"Step .*, parameter (?P<name>.+?): ", "parameters/{name}", None),
    (r"`stop-condition` is not a valid", "stop-condition", "see the expression language: names, numbers, comparisons, and/or/not"),
    (r'missing "environment"', "runtime-config-preset", "add `environment:` beside it"),
    (r'node "(?P<name>.+?)" (?:step|task) ".*?" does not exist', "nodes/{name}", "name a step of this file"),
    (r'node "(?P<name>.+?)" (?:step|task)', "nodes/{name}", None),
    (r"edge source node (?P<node>.+) does not exist", "edges/source:{node}.", "name one of the pipeline's nodes"),
    (r"edge target node (?P<node>.+) does not exist", "edges/target:{node}.", "name one of the pipeline's nodes"),
    (r"source type (?P<type>\S+) \(between (?P<node>.+?) and", "edges/source:{node}.{type}.", "use output, input, parameter, metadata or dependency"),
    (r"target type (?P<type>\S+) \(between .+ and (?P<node>.+?)\) not valid", "edges/target:{node}.{type}.", "use input, parameter, file or dependency"),
    (r'parameter "(?P<name>.+?)"(?: target|: no targets)', "parameters/{name}", None),
    (r"nodes with the same name of (?P<name>.+)", "nodes/{name}", "rename all but one"),
)  # fmt: skip


def _placed(found: Any, data: list[Any], text: YamlText, path: Path) -> Problem:
    level: Level = "error" if found["type"] == "error" else "warning"
    place, hint = _place_and_hint(found["message"])
    path = _located(data, path, place) if place else path
    line = text.line(path, key=isinstance(path[-1], str) if path else False)
    return Problem(level=level, message=found["message"].strip(), line=line, hint=hint, path=path)


def _place_and_hint(message: str) -> tuple[str, str | None]:
    for pattern, place, hint in _SEMANTIC:
        match = re.search(pattern, message, re.DOTALL)
        if match:
            groups = {key: value.replace("/", "\0") for key, value in match.groupdict().items()}
            return place.format(**groups), hint
    return "", None


def _located(data: list[Any], path: Path, place: str) -> Path:
    """Follow `key/name` and `edges/side:prefix` as far as they lead."""
    value = value_at(data, path)
    for step in place.split("/"):
        wanted = step.replace("\0", "/")
        if isinstance(value, dict):
            key: str | int | None = wanted if wanted in value else None
        else:
            key = next((i for i, entry in enumerate(value or ()) if _is(entry, wanted)), None)
        if key is None:
            return path
        path, value = (*path, key), value[key]
    return path


def _is(entry: Any, wanted: str) -> bool:
    if isinstance(entry, dict) and "name" in entry:
        return entry["name"] == wanted
    side, _, prefix = wanted.partition(":")
    if side not in ("source", "target"):
        return False
    if isinstance(entry, list):
        socket = entry[0 if side == "source" else -1] if entry else ""
    else:
        socket = entry.get(side, "") if isinstance(entry, dict) else ""
    return str(socket).startswith(prefix)
