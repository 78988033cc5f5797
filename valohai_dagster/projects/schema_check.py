"""The library's JSON schema, with each violation placed on its line and told in words (Y-06)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import date
from difflib import get_close_matches
from typing import Any

from jsonschema.exceptions import ValidationError, relevance
from valohai_yaml.validation import get_validator

from valohai_dagster.projects.problems import Problem
from valohai_dagster.projects.yaml_text import YamlText, child_of


def schema_problems(text: YamlText) -> Iterator[Problem]:
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
    if error.validator == "required":
        missing = re.match(r"'(.+)' is a required", error.message)
        return f"add `{missing[1]}:`" if missing else None
    if error.validator in ("type", "oneOf", "anyOf"):
        return _type_hint(error.instance)
    return None


def _type_hint(value: Any) -> str | None:
    """For values that YAML 1.1 reads differently than they look."""
    if isinstance(value, (bool, int, float, date)):
        return f"quote it to make it text: '{value}'"
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value):
        return f"YAML 1.1 reads `{value}` as text: write `{re.sub('[eE]', '.0e', value)}`"
    return None


def _place(data: Any, path: Sequence[str | int]) -> str:
    """`step "train", parameters[0] "lr", default` for a path into the data."""
    words: list[str] = []
    for depth, part in enumerate(path):
        data = child_of(data, part)
        name = data.get("name") if isinstance(data, dict) else None
        label = f"[{part}]" if isinstance(part, int) else str(part)
        if isinstance(part, int) and words:
            words[-1] += label
        elif depth:
            words.append(label)
        if isinstance(name, str) and words:
            words[-1] += f" `{name}`"
    return ", ".join(words) or "the file"
