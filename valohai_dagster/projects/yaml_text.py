"""YAML text to data that remembers its lines, with the traps of YAML turned into messages.

Parsing is PyYAML's safe loader; this adds the place of every value, duplicate keys (YAML keeps the last one silently),
and a refusal of documents whose aliases would expand to a size that no project needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from valohai_dagster.projects.problems import Problem

MAX_BYTES = 5_000_000
MAX_VALUES = 500_000  # after expansion of aliases

_HINTS = (  # text of the parser -> what usually causes it
    ("found character '\\t'", "YAML forbids tabs for indentation: use spaces"),
    ("mapping values are not allowed", "quote a value that holds `: `, and check the indentation"),
    (
        "could not find expected ':'",
        "is a colon missing, or is the line above indented differently?",
    ),
    ("found undefined alias", "define the anchor (`&name`) above its first use"),
    ("found unexpected end of stream", "a quote or bracket is not closed"),
    ("did not find expected", "check the indentation and that every quote and bracket is closed"),
    ("found unknown escape", "use single quotes, or write backslashes twice"),
    ("cannot start any token", "quote a value that starts with @, ` or %"),
    ("expected <block end>", "this line is indented differently from the ones before it"),
    ("expected a single document", "remove the `---` line: one file holds one document"),
    ("could not determine a constructor", "remove the `!tag`: plain YAML only"),
)


@dataclass(frozen=True, kw_only=True)
class YamlText:
    """Parsed data and where each of its values stands."""

    data: Any
    root: Node | None = field(repr=False)
    problems: tuple[Problem, ...] = ()

    def line(self, path: Sequence[str | int], *, key: bool = False) -> int | None:
        """Line of the value at `path`, or of its nearest ancestor; with `key`, of the key that leads to it."""
        node, line = self.root, _line(self.root)
        for part in path:
            key_node, value = _child(node, part)
            if value is None:
                break
            node = value
            line = _line(key_node) if key and key_node is not None else _line(value)
        return line


def read(text: bytes | str) -> YamlText:
    """Data, or problems of level error and data None; never raises for what is in the text."""
    try:
        decoded = _decoded(text)
        root = yaml.compose(decoded, Loader=yaml.SafeLoader)
        if root is not None and _expanded_size(root, {}, set()) > MAX_VALUES:
            return _broken(
                f"the aliases expand to more than {MAX_VALUES:,} values", hint="write them out"
            )
        data = yaml.safe_load(decoded)
    except yaml.YAMLError as error:
        return YamlText(data=None, root=None, problems=(_of_yaml_error(error),))
    except RecursionError:
        return _broken("values are nested too deeply")
    except ValueError as error:
        return _broken(f"a value cannot be read: {error}", hint="quote it if it is text")
    return YamlText(data=data, root=root, problems=tuple(_duplicate_keys(root)))


def child_of(data: Any, part: str | int) -> Any:
    """One level down in plain data; None where there is nothing."""
    try:
        return data[part]
    except (KeyError, IndexError, TypeError):
        return None


def _broken(message: str, *, line: int | None = None, hint: str | None = None) -> YamlText:
    problem = Problem(level="error", message=message, line=line, hint=hint)
    return YamlText(data=None, root=None, problems=(problem,))


def _decoded(text: bytes | str) -> str:
    if len(text) > MAX_BYTES:
        raise ValueError(f"the file has {len(text):,} bytes, the limit is {MAX_BYTES:,}")
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8") from None


def _of_yaml_error(error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    words = str(getattr(error, "problem", None) or error).strip()
    context = getattr(error, "context", None)
    hint = next((hint for sign, hint in _HINTS if sign in f"{words} {error}"), None)
    message = f"not valid YAML: {words}{f' ({context})' if context else ''}"
    if mark is not None:
        message += f", column {mark.column + 1}"
    return Problem(level="error", message=message, line=mark.line + 1 if mark else None, hint=hint)


def _expanded_size(node: Node, known: dict[int, int], above: set[int]) -> int:
    """Number of values with each alias counted as often as it is used."""
    if id(node) in above:
        raise ValueError("an alias refers to a value that contains it")
    if id(node) not in known:
        above.add(id(node))
        known[id(node)] = 1 + sum(_expanded_size(child, known, above) for child in _children(node))
        above.discard(id(node))
    return known[id(node)]


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, SequenceNode):
        yield from node.value
    elif isinstance(node, MappingNode):
        for key, value in node.value:
            yield key
            yield value


def _places(node: Node) -> Iterator[tuple[str | int, Node]]:
    """The values below a node, each with the part of the path that leads to it."""
    if isinstance(node, SequenceNode):
        yield from enumerate(node.value)
    elif isinstance(node, MappingNode):
        yield from ((str(key.value), value) for key, value in node.value)


def _duplicate_keys(root: Node | None) -> Iterator[Problem]:
    """One warning per repeated key, each node visited once however often it is aliased."""
    todo: list[tuple[tuple[str | int, ...], Node]] = [((), root)] if root else []
    seen = set[int]()
    while todo:
        path, node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        names = set[str]()
        for key, _ in node.value if isinstance(node, MappingNode) else ():
            if isinstance(key, ScalarNode) and key.value in names and key.value != "<<":
                message = f"key `{key.value}` is given twice; the last one counts"
                place = (*path, key.value)
                yield Problem(level="warning", message=message, line=_line(key), path=place)
            names.add(str(key.value))
        todo.extend(((*path, part), child) for part, child in reversed(list(_places(node))))


def _child(node: Node | None, part: str | int) -> tuple[Node | None, Node | None]:
    """(key node, value node) below `node`; the last of equal keys, then keys that `<<` merges in."""
    if isinstance(node, SequenceNode) and isinstance(part, int) and -1 < part < len(node.value):
        return None, node.value[part]
    if not isinstance(node, MappingNode):
        return None, None
    for key, value in reversed(node.value):
        if isinstance(key, ScalarNode) and key.value == str(part):
            return key, value
    for key, value in node.value:
        if isinstance(key, ScalarNode) and key.value == "<<":
            for merged in value.value if isinstance(value, SequenceNode) else [value]:
                found = _child(merged, part)
                if found[1] is not None:
                    return found
    return None, None


def _line(node: Node | None) -> int | None:
    return node.start_mark.line + 1 if node is not None else None
