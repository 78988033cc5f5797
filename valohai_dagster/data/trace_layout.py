"""Columns and rows of a trace: what was there first stands left of what came of it. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from valohai_dagster.data.trace import Trace

SWEEPS = 4  # over the columns, to bring neighbours to one height


@dataclass(frozen=True, kw_only=True)
class Place:
    column: int
    row: float  # may be between two lines


def place(trace: Trace) -> dict[str, Place]:
    """A place for every node; edges go from left to right, also when the records hold a cycle, which is cut."""
    before: dict[str, set[str]] = defaultdict(set)
    after: dict[str, set[str]] = defaultdict(set)
    for edge in trace.edges:
        before[edge.target].add(edge.source)
        after[edge.source].add(edge.target)
    columns = _columns(trace.nodes, before, after)
    lines: dict[int, list[str]] = defaultdict(list)
    for key in trace.nodes:
        lines[columns[key]].append(key)
    _order(lines, before, after)
    rows = _rows(lines, before, after)
    return {key: Place(column=columns[key], row=rows[key]) for key in trace.nodes}


def _columns(
    nodes: Collection[str], before: Mapping[str, set[str]], after: Mapping[str, set[str]]
) -> dict[str, int]:
    """Longest way from a beginning; then beginnings move right, to just before their first use."""
    waiting = {key: len(before.get(key, ())) for key in nodes}
    ready = [key for key in nodes if not waiting[key]]
    columns = dict.fromkeys(nodes, 0)
    done: set[str] = set()
    while len(done) < len(columns):
        if not ready:  # a cycle: cut where it was met first
            ready = [next(key for key in nodes if key not in done)]
        key = ready.pop(0)
        if key in done:
            continue
        done.add(key)
        for target in sorted(after.get(key, ())):
            if target in done:
                continue
            columns[target] = max(columns[target], columns[key] + 1)
            waiting[target] -= 1
            if waiting[target] == 0:
                ready.append(target)
    for key in nodes:
        if not before.get(key) and after.get(key):
            nearest = min(columns[target] for target in after[key]) - 1
            columns[key] = max(columns[key], nearest)
    return columns


def _order(
    lines: dict[int, list[str]], before: Mapping[str, set[str]], after: Mapping[str, set[str]]
) -> None:
    """Neighbours stand at the height of their neighbours, so that few lines cross."""
    position = {key: n for keys in lines.values() for n, key in enumerate(keys)}
    for sweep in range(SWEEPS):
        side = before if sweep % 2 == 0 else after
        for column in sorted(lines, reverse=bool(sweep % 2)):

            def height(key: str, side: Mapping[str, set[str]] = side) -> float:
                others = side.get(key)
                if not others:
                    return float(position[key])
                return sum(position[other] for other in others) / len(others)

            lines[column].sort(key=height)
            position.update((key, n) for n, key in enumerate(lines[column]))


def _rows(
    lines: Mapping[int, list[str]], before: Mapping[str, set[str]], after: Mapping[str, set[str]]
) -> dict[str, float]:
    """The longest column is dense; others stand around its middle, near what they belong to."""
    most = max((len(keys) for keys in lines.values()), default=0)
    rows: dict[str, float] = {}
    for keys in lines.values():
        start = (most - len(keys)) / 2
        rows.update((key, start + n) for n, key in enumerate(keys))
    for _ in range(SWEEPS):
        for keys in lines.values():
            _relax(keys, rows, before, after)
    lowest = min(rows.values(), default=0.0)
    return {key: row - lowest for key, row in rows.items()}


def _relax(
    keys: list[str],
    rows: dict[str, float],
    before: Mapping[str, set[str]],
    after: Mapping[str, set[str]],
) -> None:
    """Towards the middle of the neighbours, keeping the order and a row of distance."""
    wanted = []
    for key in keys:
        others = [*before.get(key, ()), *after.get(key, ())]
        middle = sum(rows[other] for other in others) / len(others) if others else rows[key]
        wanted.append(middle)
    placed: list[float] = []
    for n, row in enumerate(wanted):
        placed.append(row if n == 0 else max(row, placed[-1] + 1))
    shift = sum(w - p for w, p in zip(wanted, placed, strict=True)) / len(keys)
    rows.update((key, row + shift) for key, row in zip(keys, placed, strict=True))
