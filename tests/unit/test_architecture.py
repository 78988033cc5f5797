"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in ("valohai_dagster", "agent/valohai_agent", "definitions", "resources", "sensors")
    for path in (ROOT / folder).rglob("*.py")
)
PRIVATE_DAGSTER = "valohai_dagster/plugin/compat/"
MAX_FILE_LINES = 500
ONE_FILE_ON_PURPOSE = {"agent/valohai_agent/protocol.py"}  # the wire contract, defined once
MAX_FUNCTION_LINES = 60


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_private_dagster(name: str) -> bool:
    top, *rest = name.split(".")
    private = [part for part in rest if part.startswith("_") and not part.endswith("__")]
    return top.startswith("dagster") and bool(private)


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {relative(path): ast.parse(path.read_text("utf-8")) for path in SOURCES}


def test_private_names_of_dagster_are_imported_in_one_file(trees: dict[str, ast.Module]) -> None:
    found = {
        f"{name}: {module}"
        for name, tree in trees.items()
        if not name.startswith(PRIVATE_DAGSTER)
        for module in imported(tree)
        if is_private_dagster(module)
    }
    assert not found


def test_every_module_says_what_it_is(trees: dict[str, ast.Module]) -> None:
    silent = [name for name, tree in trees.items() if tree.body and not ast.get_docstring(tree)]
    assert not silent


def test_no_file_is_longer_than_the_ceiling() -> None:
    counts = {relative(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    long = {name: count for name, count in counts.items() if count > MAX_FILE_LINES}
    assert not long.keys() - ONE_FILE_ON_PURPOSE


def test_no_function_is_longer_than_the_ceiling(trees: dict[str, ast.Module]) -> None:
    long = {
        f"{name}:{node.lineno} {node.name}": length
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := (node.end_lineno or 0) - node.body[0].lineno + 1) > MAX_FUNCTION_LINES
    }
    assert not long


def test_modules_are_named_by_what_they_hold() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common", "manager"}
    assert not [relative(path) for path in SOURCES if path.stem in vague]


def test_every_line_of_the_log_has_an_action(trees: dict[str, ast.Module]) -> None:
    """STYLE, logging: one word for what happened, for those who read logs with programs."""
    without = [
        f"{name}:{node.lineno}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if is_log_call(node) and not any(keyword.arg == "extra" for keyword in node.keywords)
    ]
    assert not without


def is_log_call(node: ast.AST) -> TypeGuard[ast.Call]:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("info", "warning", "error", "exception")
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("log", "logger")
    )
