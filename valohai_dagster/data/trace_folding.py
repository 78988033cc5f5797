"""Files of a trace that were made and used alike become one, and what is too much to be shown is left out. Pure.

An execution may read thousands of files of one other execution. Each has the same neighbours as the next, so one line
or box with their number says as much. What is asked for is never folded, nor are executions and what has an alias.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from valohai_dagster.data.trace import Edge, Node, Trace

MOST_SHOWN = 400
FEWEST_FOLDED = 8
NAMES = 3  # that a folded node tells
_FOLDED = {"file": "files", "outside": "sources"}


def fold(trace: Trace) -> Trace:
    """The trace with one node for alike files."""
    groups: dict[Any, list[Node]] = defaultdict(list)
    before, after = _neighbours(trace.edges)
    for node in trace.nodes.values():
        if node.kind in _FOLDED and node.key not in trace.roots and not node.facts.get("aliases"):
            groups[_alike(node, before, after)].append(node)
    instead: dict[str, Node] = {}
    for members in groups.values():
        if len(members) >= FEWEST_FOLDED:
            instead.update(dict.fromkeys((one.key for one in members), _folded(members)))
    nodes = [instead.get(key, node) for key, node in trace.nodes.items()]
    return _with(trace, nodes, {key: node.key for key, node in instead.items()}, trace.left_out)


def cut(trace: Trace, most: int = MOST_SHOWN) -> Trace:
    """What is nearest to the roots; of things that are equally near, executions first."""
    if len(trace.nodes) <= most:
        return trace
    ranks = _distances(trace)
    far = len(trace.nodes)
    nearest = sorted(
        trace.nodes.values(), key=lambda node: (ranks.get(node.key, far), node.kind != "execution")
    )
    left_out = trace.left_out + sum(node.count for node in nearest[most:])
    return _with(trace, nearest[:most], {}, left_out)


def _with(trace: Trace, nodes: Iterable[Node], names: Mapping[str, str], left_out: int) -> Trace:
    """These nodes, and the edges between them; `names`: the key that stands for another."""
    kept = {node.key: node for node in nodes}
    edges = dict.fromkeys(
        Edge(
            source=names.get(edge.source, edge.source),
            target=names.get(edge.target, edge.target),
            label=edge.label,
        )
        for edge in trace.edges
    )
    return Trace(
        roots=trace.roots,
        nodes=kept,
        edges=[edge for edge in edges if edge.source in kept and edge.target in kept],
        truncated=trace.truncated or left_out > trace.left_out,
        left_out=left_out,
    )


_Links = Mapping[str, set[tuple[str, str]]]


def _neighbours(edges: Sequence[Edge]) -> tuple[_Links, _Links]:
    before: dict[str, set[tuple[str, str]]] = defaultdict(set)
    after: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for edge in edges:
        before[edge.target].add((edge.source, edge.label))
        after[edge.source].add((edge.target, edge.label))
    return before, after


def _alike(node: Node, before: _Links, after: _Links) -> Any:
    """Equal for files of one kind and place with the same neighbours by the same inputs."""
    place = _directory(node) if node.kind == "outside" else node.facts.get("of_lost_attempt")
    links = (before.get(node.key, ()), after.get(node.key, ()))
    return (node.kind, place, *map(frozenset, links))


def _directory(node: Node) -> str:
    return str(node.facts.get("uri", "")).rpartition("/")[0]


def _folded(members: Sequence[Node]) -> Node:
    first = members[0]
    keys = "\n".join(sorted(one.key for one in members))
    names = sorted((one.title for one in members), key=_natural)
    facts: dict[str, Any] = {"names": names[:NAMES]}
    if first.kind == "outside":
        facts["uri"] = f"{_directory(first)}/"
    facts["size"] = sum(one.facts.get("size", 0) for one in members)
    if purged := sum(bool(one.facts.get("purged")) for one in members):
        facts["purged"] = purged
    return Node(
        kind="files" if first.kind == "file" else "sources",
        id=hashlib.sha256(keys.encode()).hexdigest()[:24],
        title=f"{len(members):,} files",
        facts=facts,
        count=len(members),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers by their value.

    >>> sorted(["o10", "o9", "o"], key=_natural)
    ['o', 'o9', 'o10']
    """
    parts = re.split(r"([0-9]+)", name)
    return [(len(part) if n % 2 else 0, part) for n, part in enumerate(parts)]


def _distances(trace: Trace) -> dict[str, int]:
    """Steps from the nearest root, either way."""
    near: dict[str, list[str]] = defaultdict(list)
    for edge in trace.edges:
        near[edge.source].append(edge.target)
        near[edge.target].append(edge.source)
    found = dict.fromkeys((key for key in trace.roots if key in trace.nodes), 0)
    front = list(found)
    while front:
        reached = [other for key in front for other in near[key] if other not in found]
        steps = found[front[0]] + 1
        found.update(dict.fromkeys(reached, steps))
        front = list(dict.fromkeys(reached))
    return found
