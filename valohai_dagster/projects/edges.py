"""Pipelines as dependencies between steps, for the asset graph.

A pipeline joins nodes, an asset graph joins steps. A step behaves like the first node, in file order, that feeds a
given socket of it; what other nodes or pipelines would feed into the same socket is left out with a note, because the
asset has one upstream per socket. Cycles, possible once pipelines are laid over each other, are broken by
dropping the edges that come last in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from valohai_yaml.objs import Edge, ExecutionNode, Node, Pipeline, Step, TaskNode

from valohai_dagster.projects.problems import Problem

SourceType = Literal[
    "output", "input", "parameter", "metadata", "environment-variable", "dependency"
]
TargetType = Literal["input", "parameter", "environment-variable", "dependency"]

_SOURCES_OF: dict[str, frozenset[str]] = {  # P-10, P-19
    "input": frozenset({"output", "input"}),
    "parameter": frozenset({"parameter", "metadata"}),
    "environment-variable": frozenset({"parameter", "metadata", "environment-variable"}),
}


@dataclass(frozen=True, kw_only=True)
class StepEdge:
    """What the asset of `target_step` takes from the asset of `source_step` (P-10). Names are the steps' own."""

    source_step: str
    source_type: SourceType
    source_key: str
    target_step: str
    target_type: TargetType
    target_key: str
    merge_mode: Literal["replace", "append"] = "replace"  # of the target node (P-12, P-13)
    pipeline: str = field(default="", compare=False)  # where it comes from, for messages

    @property
    def source(self) -> str:
        return f"{self.source_step}.{self.source_type}.{self.source_key}"

    @property
    def target(self) -> str:
        return f"{self.target_step}.{self.target_type}.{self.target_key}"


def derive_edges(
    steps: Mapping[str, Step],
    pipelines: Mapping[str, Pipeline],
    task_steps: Mapping[str, str] | None = None,
) -> tuple[tuple[StepEdge, ...], tuple[Problem, ...]]:
    """Edges of the step graph, without cycles, and what was left out and why.

    `task_steps` maps task blueprints to their step (Y-92).
    """
    graph = _Graph()
    for pipeline in pipelines.values():
        _warn_of_node_cycle(pipeline, graph, task_steps or {})
        for found in _edges_of(pipeline, steps, task_steps or {}):
            if isinstance(found, Problem):
                graph.problems.append(found)
            else:
                graph.add(*found)
    return tuple(graph.edges), tuple(dict.fromkeys(graph.problems))


@dataclass
class _Graph:
    edges: list[StepEdge] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    owner: dict[str, tuple[str, str]] = field(
        default_factory=dict
    )  # target socket -> (pipeline, node)
    after: dict[str, set[str]] = field(default_factory=dict)  # source step -> target steps

    def add(self, edge: StepEdge, node: str) -> None:
        if edge in self.edges:
            return
        if edge.source_step == edge.target_step:
            self._leave_out(edge, "an asset cannot depend on itself")
        elif self._reaches(edge.target_step, edge.source_step):
            self._leave_out(edge, "it closes a cycle with the edges before it in the file")
        elif edge.target_type != "dependency" and not self._owns(edge, node):
            first = self.owner[edge.target]
            self._leave_out(
                edge, f"node `{first[1]}` of pipeline `{first[0]}` feeds this socket already"
            )
        elif self._is_second_parameter(edge):
            self._leave_out(edge, "only one edge may fill a parameter (P-15)", level="warning")
        else:
            self.edges.append(edge)
            self.after.setdefault(edge.source_step, set()).add(edge.target_step)

    def _owns(self, edge: StepEdge, node: str) -> bool:
        return self.owner.setdefault(edge.target, (edge.pipeline, node)) == (edge.pipeline, node)

    def _is_second_parameter(self, edge: StepEdge) -> bool:
        single = edge.target_type in ("parameter", "environment-variable")
        return single and any(edge.target == other.target for other in self.edges)

    def _reaches(self, start: str, goal: str) -> bool:
        todo, seen = [start], {start}
        while todo:
            step = todo.pop()
            if step == goal:
                return True
            new = self.after.get(step, set()) - seen
            seen |= new
            todo.extend(new)
        return False

    def _leave_out(
        self, edge: StepEdge, why: str, *, level: Literal["warning", "note"] = "note"
    ) -> None:
        message = f"pipeline `{edge.pipeline}`: the edge {edge.source} -> {edge.target} adds nothing to the asset graph: {why}"
        concerned = tuple(dict.fromkeys((edge.source_step, edge.target_step)))
        self.problems.append(Problem(level=level, message=message, steps=concerned))


def _edges_of(
    pipeline: Pipeline, steps: Mapping[str, Step], task_steps: Mapping[str, str]
) -> Iterator[tuple[StepEdge, str] | Problem]:
    """Edges between steps of this file with the target node's name, in the order of nodes, then of edges."""
    nodes = pipeline.node_map
    step_of = {name: _step_of(node, task_steps) for name, node in nodes.items()}
    for target in nodes:
        for edge in (edge for edge in pipeline.edges if edge.target_node == target):
            source_step, target_step = step_of.get(edge.source_node), step_of.get(target)
            if source_step not in steps or target_step not in steps:
                continue  # a deployment node, another commit, or an error that lint reports
            yield _edge(
                pipeline, edge, nodes, cast("str", source_step), cast("str", target_step), steps
            )


def _step_of(node: Node, task_steps: Mapping[str, str]) -> str | None:
    if isinstance(node, ExecutionNode):
        return None if node.commit else node.step
    if isinstance(node, TaskNode):
        return None if node.commit else node.step or task_steps.get(node.task or "")
    return None


def _edge(
    pipeline: Pipeline,
    edge: Edge,
    nodes: Mapping[str, Node],
    source_step: str,
    target_step: str,
    steps: Mapping[str, Step],
) -> tuple[StepEdge, str] | Problem:
    reason = _unusable(edge, nodes, steps[source_step], steps[target_step])
    if reason:
        message = f"pipeline `{pipeline.name}`: the edge {edge.source} -> {edge.target} is ignored: {reason}"
        concerned = tuple(dict.fromkeys((source_step, target_step)))
        return Problem(level="warning", message=message, steps=concerned)
    ordering = "dependency" in (edge.source_type, edge.target_type)
    target_node = nodes[edge.target_node]
    mode = getattr(target_node, "edge_merge_mode", None)
    step_edge = StepEdge(
        source_step=source_step,
        source_type="dependency" if ordering else cast("SourceType", edge.source_type),
        source_key="" if ordering else edge.source_key,
        target_step=target_step,
        target_type="dependency" if ordering else cast("TargetType", edge.target_type),
        target_key="" if ordering else edge.target_key,
        merge_mode="append" if getattr(mode, "value", mode) == "append" else "replace",
        pipeline=pipeline.name,
    )
    return step_edge, edge.target_node


def _unusable(edge: Edge, nodes: Mapping[str, Node], source: Step, target: Step) -> str | None:
    if "dependency" in (edge.source_type, edge.target_type):
        return None
    if edge.source_type not in _SOURCES_OF.get(edge.target_type, frozenset()):
        return f"`{edge.source_type}` cannot feed `{edge.target_type}`"
    if edge.target_type == "input" and edge.target_key not in target.inputs:
        return f"step `{target.name}` has no input `{edge.target_key}`"
    if edge.target_type == "parameter" and edge.target_key not in target.parameters:
        return f"step `{target.name}` has no parameter `{edge.target_key}`"
    if edge.source_type == "parameter" and edge.source_key not in source.parameters:
        return f"step `{source.name}` has no parameter `{edge.source_key}`"
    if edge.target_type == "parameter" and isinstance(nodes[edge.target_node], TaskNode):
        return "it fills the variants of a task, which a single execution does not have"
    if edge.source_type in ("parameter", "metadata") and isinstance(
        nodes[edge.source_node], TaskNode
    ):
        return "a task has one value per child (P-18)"
    return None


def _warn_of_node_cycle(pipeline: Pipeline, graph: _Graph, task_steps: Mapping[str, str]) -> None:
    cycle = node_cycle(pipeline)
    if cycle:
        message = f"pipeline `{pipeline.name}` is cyclic ({' -> '.join(cycle)}) and could never run (Y-105)"
        hint = "remove one of these edges; until then the asset graph leaves out the edge that closes the cycle"
        found = [_step_of(pipeline.node_map[name], task_steps) for name in cycle]
        steps = tuple(dict.fromkeys(step for step in found if step))
        graph.problems.append(Problem(level="warning", message=message, hint=hint, steps=steps))


def node_cycle(pipeline: Pipeline) -> list[str]:
    """Node names of one cycle, first node repeated at the end; empty when the pipeline is acyclic."""
    after: dict[str, list[str]] = {name: [] for name in pipeline.node_map}
    for edge in pipeline.edges:
        if edge.source_node in after and edge.target_node in after:
            after[edge.source_node].append(edge.target_node)
    done: set[str] = set()
    for start in after:
        path: list[str] = []
        todo: list[tuple[str, bool]] = [(start, True)]
        while todo:
            name, entering = todo.pop()
            if not entering:
                done.add(path.pop())
            elif name in path:
                return [*path[path.index(name) :], name]
            elif name not in done:
                path.append(name)
                todo.append((name, False))
                todo.extend((following, True) for following in reversed(after[name]))
    return []
