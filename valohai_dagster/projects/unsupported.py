"""Every key of a valohai.yaml that has no effect here, in words, at its place.

What this finds is shown in the description of the assets that it concerns and in the log of their executions, so that
nothing in the file is ignored silently. A feature that comes to be supported loses its entry here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from valohai_dagster.projects.items import Path, edge_ends, items_of, kind_of, value_at
from valohai_dagster.projects.problems import Problem
from valohai_dagster.projects.yaml_text import YamlText

Found = tuple[Path, str]

_STEP_KEYS = {
    "cache-volumes": "only Kubernetes workers have cache volumes (Y-14)",
    "runtime-config-preset": "runtime presets are not supported yet",
    "resources": "only Kubernetes workers have resource requests",
    "icon": "assets have no icons of their own",
}
_DAGSTER_GOES_ON = "stop-next"  # the `on-error` that Dagster has by itself (Y-95)


def unsupported_keys(data: list[Any], text: YamlText) -> Iterator[Problem]:
    """One note per key; of items that are defined twice only the one that counts (Y-05)."""
    for path, message in _found(data):
        line = text.line(path, key=isinstance(path[-1], str))
        yield Problem(level="note", message=message, line=line, path=path)


def _found(data: list[Any]) -> Iterator[Found]:
    finders = (
        (("step",), _step),
        (("task",), _task),
        (("endpoint",), _endpoint),
        (("pipeline", "blueprint"), _pipeline),
        (("deployment",), _deployment),
    )
    for kinds, find in finders:
        for name, path in dict(items_of(data, *kinds)).items():
            for below, message in find(name, value_at(data, path)):
                yield (*path, *below), message
    for index, item in enumerate(data):
        kind = kind_of(item)
        for key in item if kind else ():
            if kind_of({key: None}) is None:
                yield (index, key), f"key `{key}` beside `{kind}` has no effect: it has no meaning"


def _step(name: str, step: Mapping[str, Any]) -> Iterator[Found]:
    for key, why in _STEP_KEYS.items():
        if step.get(key):
            yield (key,), f"step `{name}`: `{key}` has no effect: {why}"
    for number, parameter in enumerate(step.get("parameters") or ()):
        if parameter.get("widget"):
            words = f"step `{name}`, parameter `{parameter.get('name')}`: `widget` has no effect"
            yield ("parameters", number, "widget"), f"{words}: the Launchpad is plain text"


def _task(name: str, task: Mapping[str, Any]) -> Iterator[Found]:
    keys = ", ".join(f"`{key}`" for key in task if key not in ("name", "step"))
    words = f"task `{name}` of step `{task.get('step')}` has no effect ({keys})"
    why = "tasks are not supported yet; the step's asset runs one execution with the values of the launch"
    yield (), f"{words}: {why}"


def _endpoint(name: str, endpoint: Mapping[str, Any]) -> Iterator[Found]:
    yield (
        (),
        f"endpoint `{name}` has no effect: nothing is served, deployments are not supported yet",
    )


def _deployment(name: str, deployment: Mapping[str, Any]) -> Iterator[Found]:
    yield (), f"deployment `{name}` has no effect: deployments are not supported yet"


def _pipeline(name: str, pipeline: Mapping[str, Any]) -> Iterator[Found]:
    """Of a pipeline the asset graph takes the edges between steps; all else is named here."""
    place = f"pipeline `{name}`"
    if pipeline.get("reuse-executions"):
        words = "every materialization is a new execution"
        yield ("reuse-executions",), f"{place}: `reuse-executions` has no effect: {words}"
    for number, parameter in enumerate(pipeline.get("parameters") or ()):
        words = f"{place}: parameter `{parameter.get('name')}` has no effect: pipeline parameters are not supported yet"
        yield ("parameters", number), f"{words}; give the values to the steps at launch"
    for number, node in enumerate(pipeline.get("nodes") or ()):
        for below, words in _node(node):
            yield ("nodes", number, *below), f"{place}, node `{node.get('name')}`{words}"
    for number, edge in enumerate(pipeline.get("edges") or ()):
        if isinstance(edge, dict) and edge.get("configuration"):
            source, target = edge_ends(edge)
            words = f"{place}, edge {source} -> {target}: `configuration` has no effect"
            yield ("edges", number, "configuration"), f"{words}: it is not supported yet"


def _node(node: Mapping[str, Any]) -> Iterator[Found]:
    kind = node.get("type")
    if kind == "deployment":
        yield (), " has no effect: deployments are not supported yet"
        return
    if kind == "task":
        yield ("type",), ": `type: task` has no effect: the step's asset runs one execution"
    if node.get("commit"):
        words = "the step of another commit is not in the asset graph, nor are the node's edges"
        yield ("commit",), f": `commit` has no effect: {words}"
    if node.get("override"):
        keys = ", ".join(f"`{key}`" for key in node["override"])
        words = f": `override` of {keys} has no effect: the asset runs the step as it is written"
        yield ("override",), f"{words}; change it at launch"
    if node.get("actions"):
        yield ("actions",), ": `actions` have no effect: they are not supported yet"
    if node.get("on-error", _DAGSTER_GOES_ON) != _DAGSTER_GOES_ON:
        words = "a failure skips what depends on the step, and nothing else"
        yield ("on-error",), f": `on-error: {node['on-error']}` has no effect: {words}"
