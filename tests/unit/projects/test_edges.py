"""Pipelines as dependencies between steps."""

from __future__ import annotations

from textwrap import dedent

from valohai_dagster.projects.edges import StepEdge, derive_edges, node_cycle
from valohai_dagster.projects.lint import check_config
from valohai_dagster.projects.problems import Problem

STEPS = """
- step:
    name: prep
    image: i
    command: c
    parameters: [{name: size, type: integer, default: 1}]
- step:
    name: prep2
    image: i
    command: c
- step:
    name: train
    image: i
    command: c
    inputs: [{name: data}, {name: extra, optional: true}]
    parameters: [{name: lr, type: float, optional: true}]
    environment-variables: [{name: SIZE}]
- step:
    name: eval
    image: i
    command: c
    inputs: [{name: models}]
"""


def derive(pipelines: str) -> tuple[tuple[StepEdge, ...], tuple[Problem, ...]]:
    checked = check_config(dedent(STEPS) + dedent(pipelines))
    assert checked.config is not None, [str(problem) for problem in checked.problems]
    config = checked.config
    return derive_edges(
        config.steps, config.pipelines, {n: t.step for n, t in config.tasks.items()}
    )


def arrows(edges: tuple[StepEdge, ...]) -> list[str]:
    return [f"{edge.source} -> {edge.target}" for edge in edges]


def test_p10_edges_become_step_edges_and_keep_their_keys() -> None:
    edges, problems = derive(
        """
        - pipeline:
            name: p
            nodes:
              - {name: a, type: execution, step: prep}
              - {name: b, type: execution, step: train, edge-merge-mode: append}
            edges:
              - [a.output.results/*.csv, b.input.data]
              - [a.metadata.val.loss, b.parameter.lr]
              - [a.parameter.size, b.environment-variable.SIZE]
              - [a.dependency.any, b.dependency.thing]
        """
    )
    assert arrows(edges) == [
        "prep.output.results/*.csv -> train.input.data",
        "prep.metadata.val.loss -> train.parameter.lr",
        "prep.parameter.size -> train.environment-variable.SIZE",
        "prep.dependency. -> train.dependency.",
    ]
    assert {edge.merge_mode for edge in edges} == {"append"}
    assert not problems


def test_several_nodes_of_one_step_feed_as_one() -> None:
    edges, problems = derive(
        """
        - pipeline:
            name: three trainings
            nodes:
              - {name: p, type: execution, step: prep}
              - {name: t1, type: execution, step: train}
              - {name: t2, type: execution, step: train}
              - {name: e, type: execution, step: eval}
            edges:
              - [p.output.*, t1.input.data]
              - [p.output.*, t2.input.data]
              - [t1.output.model*, e.input.models]
              - [t2.output.model*, e.input.models]
        """
    )
    assert arrows(edges) == [
        "prep.output.* -> train.input.data",
        "train.output.model* -> eval.input.models",
    ]
    assert not problems


def test_the_first_feeder_of_a_socket_wins_and_others_are_noted() -> None:
    edges, problems = derive(
        """
        - pipeline:
            name: one
            nodes:
              - {name: a, type: execution, step: prep}
              - {name: t, type: execution, step: train}
            edges: [[a.output.*, t.input.data]]
        - pipeline:
            name: two
            nodes:
              - {name: b, type: execution, step: prep2}
              - {name: t, type: execution, step: train}
            edges: [[b.output.*, t.input.data], [b.output.x, t.input.extra]]
        """
    )
    assert arrows(edges) == [
        "prep.output.* -> train.input.data",
        "prep2.output.x -> train.input.extra",
    ]
    assert [problem.level for problem in problems] == ["note"]
    assert "node `t` of pipeline `one` feeds this socket already" in problems[0].message


def test_p12_several_edges_of_one_node_add_up() -> None:
    edges, _ = derive(
        """
        - pipeline:
            name: p
            nodes:
              - {name: a, type: execution, step: prep}
              - {name: b, type: execution, step: prep2}
              - {name: t, type: execution, step: train}
            edges: [[a.output.*, t.input.data], [b.output.*, t.input.data]]
        """
    )
    assert [edge.source_step for edge in edges] == ["prep", "prep2"]


def test_p15_v16_two_edges_into_one_parameter_are_refused() -> None:
    edges, problems = derive(
        """
        - pipeline:
            name: p
            nodes:
              - {name: a, type: execution, step: prep}
              - {name: t, type: execution, step: train}
            edges: [[a.metadata.x, t.parameter.lr], [a.metadata.y, t.parameter.lr]]
        """
    )
    assert arrows(edges) == ["prep.metadata.x -> train.parameter.lr"]
    assert problems[0].level == "warning"
    assert "P-15" in problems[0].message


def test_y105_a_cyclic_pipeline_is_named_and_the_closing_edge_left_out() -> None:
    edges, problems = derive(
        """
        - pipeline:
            name: loop
            nodes:
              - {name: t, type: execution, step: train}
              - {name: e, type: execution, step: eval}
            edges: [[t.output.*, e.input.models], [e.output.*, t.input.extra]]
        """
    )
    assert len(edges) == 1
    assert [problem.level for problem in problems] == ["warning", "note"]
    assert "t -> e -> t" in problems[0].message
    assert problems[0].hint


def test_a_cycle_across_pipelines_is_broken_the_same_way_each_time() -> None:
    text = """
        - pipeline:
            name: there
            nodes: [{name: t, type: execution, step: train}, {name: e, type: execution, step: eval}]
            edges: [[t.output.*, e.input.models]]
        - pipeline:
            name: back
            nodes: [{name: t, type: execution, step: train}, {name: e, type: execution, step: eval}]
            edges: [[e.output.*, t.input.extra]]
        """
    edges, problems = derive(text)
    assert arrows(edges) == ["train.output.* -> eval.input.models"]
    assert "closes a cycle" in problems[0].message
    assert derive(text) == (edges, problems)


def test_a_step_that_feeds_itself_has_no_edge() -> None:
    edges, problems = derive(
        """
        - pipeline:
            name: p
            nodes: [{name: t1, type: execution, step: train}, {name: t2, type: execution, step: train}]
            edges: [[t1.output.*, t2.input.data]]
        """
    )
    assert not edges
    assert "cannot depend on itself" in problems[0].message


def test_sockets_that_do_not_exist_are_warned_about() -> None:
    edges, problems = derive(
        """
        - pipeline:
            name: p
            nodes: [{name: a, type: execution, step: prep}, {name: t, type: execution, step: train}]
            edges:
              - [a.output.*, t.input.nope]
              - [a.output.*, t.parameter.lr]
              - [a.parameter.nope, t.parameter.lr]
              - [a.metadata.x, t.parameter.nope]
              - [a.metadata.x, t.input.data]
        """
    )
    assert not edges
    assert [problem.level for problem in problems] == ["warning"] * 5


def test_p18_task_nodes_pass_files_but_no_values() -> None:
    edges, problems = derive(
        """
        - task: {name: sweep, step: train, type: manual_search, parameter-sets: [{lr: 1.0}]}
        - pipeline:
            name: p
            nodes:
              - {name: a, type: execution, step: prep}
              - {name: t, type: task, task: sweep}
              - {name: t2, type: task, step: train}
              - {name: e, type: execution, step: eval}
            edges:
              - [a.output.*, t.input.data]
              - [a.metadata.x, t2.parameter.lr]
              - [t.output.*, e.input.models]
              - [t.metadata.x, e.environment-variable.Y]
        """
    )
    assert arrows(edges) == [
        "prep.output.* -> train.input.data",
        "train.output.* -> eval.input.models",
    ]
    assert ["P-18" in p.message or "variants" in p.message for p in problems] == [True, True]


def test_nodes_of_other_commits_and_deployments_are_no_assets() -> None:
    edges, problems = derive(
        """
        - pipeline:
            name: p
            nodes:
              - {name: a, type: execution, step: prep, commit: abc}
              - {name: t, type: execution, step: train}
              - {name: d, type: deployment, deployment: prod, endpoints: [e]}
            edges: [[a.output.*, t.input.data], [t.output.*, d.file.e.model]]
        """
    )
    assert not edges
    assert not problems


def test_a_long_chain_of_steps_is_no_cycle() -> None:
    from valohai_yaml.objs import Pipeline

    count = 3000
    nodes = [{"name": f"n{i}", "type": "execution", "step": f"s{i}"} for i in range(count)]
    edges = [[f"n{i}.output.*", f"n{i + 1}.input.x"] for i in range(count - 1)]
    chain = Pipeline.parse({"name": "p", "nodes": nodes, "edges": edges})
    assert node_cycle(chain) == []
    back = Pipeline.parse(
        {"name": "p", "nodes": nodes, "edges": [*edges, [f"n{count - 1}.output.*", "n0.input.x"]]}
    )
    assert len(node_cycle(back)) == count + 1
