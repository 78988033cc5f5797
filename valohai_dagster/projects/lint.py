"""valohai.yaml to the library's `Config`, with every problem placed on its line.

The rules are the library's (schema, then semantic lint); ours are the line, the hint, and that nothing in a file
can make the check itself fail (Y-06, Y-106).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from difflib import get_close_matches
from typing import Any

from jsonschema.exceptions import ValidationError, relevance
from valohai_yaml.lint import LintResult
from valohai_yaml.objs import Config, Pipeline
from valohai_yaml.validation import get_validator

from valohai_dagster.projects import yaml_text
from valohai_dagster.projects.normalise import normalised
from valohai_dagster.projects.problems import Level, Problem, errors_of
from valohai_dagster.projects.yaml_text import YamlText

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
        problems.extend(_schema_problems(text))
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


# -- shape and schema --------------------------------------------------------------------------------------------


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


def _schema_problems(text: YamlText) -> Iterator[Problem]:
    errors = sorted(
        get_validator().iter_errors(text.data), key=lambda e: (relevance(e), repr(e.path))
    )
    for error in errors:
        cause = _cause(error)
        path = tuple(cause.absolute_path)
        message = f"{_place(text.data, path)}: {_words(cause)}"
        yield Problem(
            level="error", message=message, line=_schema_line(cause, text), hint=_schema_hint(cause)
        )


def _cause(error: ValidationError) -> ValidationError:
    """The alternative that the value came closest to: the one whose error lies deepest."""
    while error.context:
        deepest = max(len(child.absolute_path) for child in error.context)
        if deepest == len(error.absolute_path):
            return error
        error = next(child for child in error.context if len(child.absolute_path) == deepest)
    return error


def _words(error: ValidationError) -> str:
    """The validator's message without the dump of the whole value that some messages begin with."""
    if error.validator in ("oneOf", "anyOf") and isinstance(error.validator_value, list):
        types = [
            str(o.get("type")) for o in error.validator_value if isinstance(o, dict) and "type" in o
        ]
        if types:
            return f"{_short(error.instance)} is not {' or '.join(dict.fromkeys(types))}"
        required = [" + ".join(o["required"]) for o in error.validator_value if "required" in o]
        if required:
            return f"exactly one of {', '.join(f'`{name}`' for name in required)} is needed"
    if error.validator == "type" and error.instance is None:
        return f"has no value, expected {error.validator_value}"
    return error.message if len(error.message) < 300 else error.message[:300] + " ..."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:60] + "..."


def _schema_line(error: ValidationError, text: YamlText) -> int | None:
    """Of the unexpected key when there is one, else of the key whose value is wrong."""
    path = tuple(error.absolute_path)
    unexpected = _unexpected(error)
    if unexpected:
        return text.line((*path, unexpected[0]), key=True)
    return text.line(path, key=True)


def _unexpected(error: ValidationError) -> list[str]:
    if error.validator != "additionalProperties" or not isinstance(error.instance, dict):
        return []
    known = error.schema.get("properties", {}) if isinstance(error.schema, dict) else {}
    return [str(key) for key in error.instance if key not in known]


def _schema_hint(error: ValidationError) -> str | None:
    if error.instance is None and len(error.absolute_path) == 2:
        return f"indent the keys of `{error.absolute_path[-1]}` deeper than the `-` before it"
    for name in _unexpected(error):
        known = error.schema.get("properties", {}) if isinstance(error.schema, dict) else {}
        close = get_close_matches(name.replace("_", "-"), known, n=1)
        return f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(sorted(known))}"
    if error.validator == "required" and isinstance(error.validator_value, list):
        missing = next((n for n in error.validator_value if n not in error.instance), None)
        return f"add `{missing}:`" if missing else None
    if error.validator in ("type", "oneOf", "anyOf") and isinstance(
        error.instance, (bool, int, float)
    ):
        return f"quote it to make it text: '{error.instance}'"
    return None


def _place(data: Any, path: Sequence[str | int]) -> str:
    """`step "train", parameters[0] "lr", default` for a path into the data."""
    words: list[str] = []
    for depth, part in enumerate(path):
        data = _at(data, part)
        name = data.get("name") if isinstance(data, dict) else None
        label = f"[{part}]" if isinstance(part, int) else str(part)
        if isinstance(part, int) and words:
            words[-1] += label
        elif depth:
            words.append(label)
        if isinstance(name, str) and words:
            words[-1] += f" `{name}`"
    return ", ".join(words) or "the file"


def _at(data: Any, part: str | int) -> Any:
    try:
        return data[part]
    except (KeyError, IndexError, TypeError):
        return None


# -- parsing -----------------------------------------------------------------------------------------------------


def _parsed(data: list[Any], text: YamlText) -> tuple[Config | None, list[Problem]]:
    """Each item by itself first, so that what one raises is reported with its line."""
    problems: list[Problem] = []
    for index, item in enumerate(data):
        try:
            Config.parse([item])
        except _PARSE_ERRORS as error:
            kind = next((kind for kind in KINDS if kind in item), "")
            name = _at(_at(item, kind), "name")
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
        value = _at(value, part)
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
