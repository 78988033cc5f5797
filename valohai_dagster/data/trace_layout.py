"""Columns and rows of a trace: what was there first stands left of what came of it. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from valohai_dagster.data.trace import Trace

SWEEPS = 4  # over the columns, to bring neighbours to one height


@dataclass(frozen=True, kw_only=True)
class Place:
    column: int
    row: float  # may be between two lines


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A place for every node, and for an edge (source, target) over several columns where it passes each."""

    places: Mapping[str, Place]
    routes: Mapping[tuple[str, str], Sequence[Place]]


def place(trace: Trace) -> Layout:
    """Edges go from left to right, also when the records hold a cycle, which is cut."""
    pairs = dict.fromkeys((edge.source, edge.target) for edge in trace.edges)
    columns = _columns(trace.nodes, *_neighbours(pairs))
    stops, hops = _long_ways(pairs, columns)
    before, after = _neighbours(hops)
    lines: dict[int, list[str]] = defaultdict(list)
    for key in columns:
        lines[columns[key]].append(key)
    _order(lines, before, after)
    rows = _rows(lines, before, after)
    places = {key: Place(column=column, row=rows[key]) for key, column in columns.items()}
    return Layout(
        places={key: places[key] for key in trace.nodes},
        routes={pair: [places[key] for key in keys] for pair, keys in stops.items()},
    )


_Pair = tuple[str, str]


def _neighbours(pairs: Iterable[_Pair]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    before: dict[str, set[str]] = defaultdict(set)
    after: dict[str, set[str]] = defaultdict(set)
    for source, target in pairs:
        before[target].add(source)
        after[source].add(target)
    return before, after


def _long_ways(
    pairs: Iterable[_Pair], columns: dict[str, int]
) -> tuple[dict[_Pair, list[str]], list[_Pair]]:
    """Stops of edges in the columns between their ends, which get room there as nodes do, and the hops from stop to stop."""
    stops: dict[_Pair, list[str]] = {}
    hops: list[_Pair] = []
    for source, target in pairs:
        between = range(columns[source] + 1, columns[target])
        keys = [f"stop:{source}>{target}:{column}" for column in between]
        columns.update(zip(keys, between, strict=True))
        if keys:
            stops[source, target] = keys
        way = [source, *keys, target]
        hops += pairwise(way)
    return stops, hops


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
