"""The items of a valohai.yaml as plain data: what each one is, and which steps a place in it concerns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from valohai_dagster.projects.yaml_text import child_of

KINDS = ("step", "task", "endpoint", "pipeline", "blueprint", "deployment")  # order of Y-04
Path = tuple[str | int, ...]


def kind_of(item: Any) -> str | None:
    """What an item is read as: the first of `KINDS` that it holds (Y-04)."""
    return next((kind for kind in KINDS if kind in item), None) if isinstance(item, dict) else None


def items_of(data: list[Any], *kinds: str) -> Iterator[tuple[str, Path]]:
    """Names of all items that are read as one of `kinds`, with their paths, in file order."""
    for index, item in enumerate(data):
        kind = kind_of(item)
        if kind in kinds and isinstance(item[kind], dict):
            yield str(item[kind].get("name")), (index, kind)


def value_at(data: Any, path: Path) -> Any:
    for part in path:
        data = child_of(data, part)
    return data


def steps_at(data: list[Any], path: Path) -> tuple[str, ...]:
    """Names of this file's steps that the place concerns; none when it concerns the project as a whole.

    Endpoints, deployments and unknown items concern no step. A pipeline concerns the steps of its nodes, a node its step, an
    edge both of its ends, a pipeline parameter its targets.
    """
    if not path:
        return ()
    kind = kind_of(child_of(data, path[0]))
    value = value_at(data, (path[0], kind)) if kind else None
    if not isinstance(value, dict):
        return ()
    known = {name for name, _ in items_of(data, "step")}
    found = _steps_of_item(data, kind, value, path[2:])
    return tuple(dict.fromkeys(str(name) for name in found if name in known))


def _steps_of_item(
    data: list[Any], kind: str | None, value: Mapping[str, Any], below: Path
) -> list[Any]:
    if kind == "step":
        return [value.get("name")]
    if kind == "task":
        return [value.get("step")]
    if kind not in ("pipeline", "blueprint"):
        return []
    nodes = _steps_of_nodes(data, value)
    names = _nodes_at(value, below)
    return [nodes[name] for name in names if name in nodes] or list(nodes.values())


def _steps_of_nodes(data: list[Any], pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """Node name to step name, task blueprints resolved (Y-92); deployment nodes have none."""
    tasks = {name: value_at(data, (*path, "step")) for name, path in items_of(data, "task")}
    nodes = [node for node in pipeline.get("nodes") or () if isinstance(node, dict)]
    steps = {
        str(node.get("name")): node.get("step") or tasks.get(str(node.get("task")))
        for node in nodes
    }
    return {name: step for name, step in steps.items() if step}


def _nodes_at(pipeline: Mapping[str, Any], below: Path) -> Sequence[str]:
    """Names of the nodes that a place in the pipeline names; a deployment node: of those that feed it."""
    value = value_at(pipeline, below[:2])
    if len(below) < 2 or value is None:
        return ()
    if below[0] == "edges":
        return [node_of(socket) for socket in edge_ends(value)]
    if below[0] == "parameters":
        targets = value.get("targets") or value.get("target") or ()
        return [node_of(target) for target in ([targets] if isinstance(targets, str) else targets)]
    if below[0] != "nodes":
        return ()
    name = str(value.get("name"))
    ends = [edge_ends(edge) for edge in pipeline.get("edges") or ()]
    feeding = [node_of(source) for source, target in ends if node_of(target) == name]
    return feeding if value.get("type") == "deployment" else [name]


def edge_ends(edge: Any) -> tuple[Any, Any]:
    """Source and target socket of the short form and of the long form (Y-101)."""
    source, target = (0, 1) if isinstance(edge, list) else ("source", "target")
    return child_of(edge, source), child_of(edge, target)


def node_of(socket: Any) -> str:
    return str(socket).split(".", 1)[0]
