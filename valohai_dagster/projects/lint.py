"""valohai.yaml to the library's `Config`, with every problem placed on its line.

The rules are the library's (schema, then semantic lint); ours are the line, the hint, and that nothing in a file
can make the check itself fail (Y-06, Y-106).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from valohai_yaml.lint import LintResult
from valohai_yaml.objs import Config, Pipeline

from valohai_dagster.projects import yaml_text
from valohai_dagster.projects.normalise import normalised
from valohai_dagster.projects.problems import Level, Problem, errors_of
from valohai_dagster.projects.schema_check import schema_problems
from valohai_dagster.projects.yaml_text import YamlText, child_of

KINDS = ("step", "task", "endpoint", "pipeline", "blueprint", "deployment")  # order of Y-04
_PARSE_ERRORS = (ValueError, TypeError, KeyError, AttributeError, IndexError)
Path = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class CheckedConfig:
    """`config` is None when a problem of level error was found."""

    config: Config | None
    problems: tuple[Problem, ...] = ()
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
    return CheckedConfig(
        config=None if errors_of(problems) else config,
        problems=_sorted(problems),
        step_lines={name: text.line(path, key=True) for name, path in _items(data, "step")},
    )


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
            kind = next((kind for kind in KINDS if kind in item), "")
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
        for name, path in _items(data, kind):
            shared = "pipeline" if kind == "blueprint" else kind
            if (shared, name) in seen:
                message = f"{kind} `{name}` is defined again; the last definition counts (Y-05)"
                problems.append(
                    Problem(level="warning", message=message, line=text.line(path, key=True))
                )
            seen.add((shared, name))
    return problems


def _items(data: list[Any], kind: str) -> Iterator[tuple[str, Path]]:
    """Names of all items that are read as `kind`, with their paths, in file order."""
    for index, item in enumerate(data):
        if next((k for k in KINDS if k in item), None) == kind and isinstance(item[kind], dict):
            yield str(item[kind].get("name")), (index, kind)


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
        paths = {name: path for kind in kinds for name, path in _items(data, kind)}
        for name, obj in objects.items():
            result = LintResult()
            try:
                obj.lint(result, {"config": config})
            except _PARSE_ERRORS as error:
                _add_crash(result, obj, error)
            for found in result.messages:
                yield _placed(found, data, text, paths.get(name, ()))


def _add_crash(result: LintResult, obj: Any, error: Exception) -> None:
    """Y-106: a pipeline parameter whose node names a missing step; that error is in the result already."""
    if not (isinstance(obj, Pipeline) and isinstance(error, KeyError) and list(result.errors)):
        result.add_error(f"`{obj.name}` cannot be checked: {type(error).__name__}: {error}")


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
    for pattern, place, hint in _SEMANTIC:
        match = re.search(pattern, found["message"], re.DOTALL)
        if match:
            groups = {key: value.replace("/", "\0") for key, value in match.groupdict().items()}
            path = _located(data, path, place.format(**groups))
            line = text.line(path, key=isinstance(path[-1], str) if path else False)
            return Problem(level=level, message=found["message"].strip(), line=line, hint=hint)
    return Problem(level=level, message=found["message"].strip(), line=text.line(path, key=True))


def _located(data: list[Any], path: Path, place: str) -> Path:
    """Follow `key/name` and `edges/side:prefix` as far as they lead."""
    value: Any = data
    for part in path:
        value = child_of(value, part)
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
