"""What edges bring from the latest materializations."""

from __future__ import annotations

from typing import Any

import pytest
from valohai_yaml.objs import Step

from valohai_dagster.projects.edges import StepEdge
from valohai_dagster.projects.step import StepDefinition
from valohai_dagster.projects.upstream import (
    UpstreamFile,
    UpstreamResult,
    matches,
    resolve_upstream,
)

TRAIN = StepDefinition(
    project="p",
    step=Step.parse(
        {
            "name": "train",
            "image": "i",
            "command": "c",
            "inputs": [{"name": "data"}, {"name": "extra", "optional": True}],
            "parameters": [{"name": "lr", "type": "float"}, {"name": "many", "multiple": "repeat"}],
        }
    ),
)


def edge(source: str, target: str, **more: Any) -> StepEdge:
    source_step, source_type, source_key = source.split(".", 2)
    target_type, target_key = target.split(".", 1)
    return StepEdge(
        source_step=source_step,
        source_type=source_type,  # type: ignore[arg-type]
        source_key=source_key,
        target_step="train",
        target_type=target_type,  # type: ignore[arg-type]
        target_key=target_key,
        **more,
    )


def files(*names: str) -> tuple[UpstreamFile, ...]:
    return tuple(UpstreamFile(name=name, uri=f"datum://{name}") for name in names)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*.json", "a.json", True),
        ("*.json", "results/a.json", True),
        ("results/*.pkl", "results/a.pkl", True),
        ("results/*.pkl", "other/results/a.pkl", False),
        ("results/*", "results/deep/a.pkl", True),
        ("model*", "model.pkl", True),
        ("model*", "out/model.pkl", True),
        ("model*", "my-model.pkl", False),
        ("*train-images*", "data/train-images-1.gz", True),
        ("*", "a\nb", True),
        ("[a].txt", "[a].txt", True),
        ("[a].txt", "a.txt", False),
        ("model.pkl", "modelxpkl", False),
    ],
)
def test_p11_the_glob_sees_the_whole_name_or_without_a_slash_the_base_name(
    pattern: str, name: str, expected: bool
) -> None:
    assert matches(pattern, name) is expected


def test_p12_v15_files_of_several_edges_add_up_once_each() -> None:
    edges = [
        edge("a.output.*", "input.data"),
        edge("a.output.x*", "input.data"),
        edge("b.output.*", "input.data"),
    ]
    made = {
        "a": UpstreamResult(outputs=files("x.csv", "y.csv")),
        "b": UpstreamResult(outputs=files("z")),
    }
    values = resolve_upstream(TRAIN, edges, made)
    assert values.inputs["data"].uris == ("datum://x.csv", "datum://y.csv", "datum://z")
    assert values.inputs["data"].merge_mode == "replace"
    assert not values.problems


def test_p14_no_match_is_a_problem_of_a_required_input_only() -> None:
    edges = [
        edge("a.output.*.pkl", "input.data", pipeline="p"),
        edge("a.output.*.pkl", "input.extra"),
    ]
    values = resolve_upstream(TRAIN, edges, {"a": UpstreamResult(outputs=files("x.csv"))})
    assert list(values.problems) == [("input", "data")]
    (words,) = values.problems["input", "data"]
    assert "a.output.*.pkl -> train.input.data of pipeline `p` matched no files" in words
    assert "'x.csv'" in words
    assert values.inputs["extra"].uris == ()


def test_p16_input_edges_select_by_input_name_then_by_file_name() -> None:
    made = {"a": UpstreamResult(inputs={"model": files("m.pkl"), "images": files("i1", "i2")})}
    assert resolve_upstream(TRAIN, [edge("a.input.model*", "input.data")], made).inputs[
        "data"
    ].uris == ("datum://m.pkl",)
    assert resolve_upstream(TRAIN, [edge("a.input.i*", "input.data")], made).inputs[
        "data"
    ].uris == ("datum://i1", "datum://i2")
    assert resolve_upstream(TRAIN, [edge("a.input.i2", "input.data")], made).inputs[
        "data"
    ].uris == ("datum://i2",)


def test_p17_metadata_fills_parameters_and_a_missing_key_is_a_problem() -> None:
    made = {"a": UpstreamResult(metadata={"best.lr": 0.5, "all": [1, 2]})}
    values = resolve_upstream(TRAIN, [edge("a.metadata.best.lr", "parameter.lr")], made)
    assert values.parameters == {"lr": 0.5}
    values = resolve_upstream(TRAIN, [edge("a.metadata.all", "parameter.many")], made)
    assert values.parameters == {"many": [1, 2]}
    values = resolve_upstream(TRAIN, [edge("a.metadata.all", "parameter.lr")], made)
    assert "not `multiple`" in values.problems["parameter", "lr"][0]
    values = resolve_upstream(TRAIN, [edge("a.metadata.gone", "parameter.lr")], made)
    assert "`all`, `best.lr`" in values.problems["parameter", "lr"][0]


def test_p19_values_become_the_text_of_variables() -> None:
    made = {"a": UpstreamResult(parameters={"n": 3, "l": ["x", "y"], "b": True})}
    edges = [
        edge("a.parameter.n", "environment-variable.N"),
        edge("a.parameter.l", "environment-variable.L"),
        edge("a.parameter.b", "environment-variable.B"),
    ]
    values = resolve_upstream(TRAIN, edges, made)
    assert values.environment_variables == {"N": "3", "L": '["x", "y"]', "B": "True"}


def test_an_upstream_that_never_ran_is_remembered_not_refused() -> None:
    edges = [edge("a.output.*", "input.data"), edge("b.metadata.x", "parameter.lr")]
    values = resolve_upstream(TRAIN, edges, {"a": None})
    assert values.unmet == {("input", "data"): ("a",), ("parameter", "lr"): ("b",)}
    assert not values.problems
    assert not values.inputs


def test_edges_into_other_steps_and_dependencies_bring_nothing() -> None:
    other = StepEdge(
        source_step="a",
        source_type="output",
        source_key="*",
        target_step="eval",
        target_type="input",
        target_key="data",
    )
    values = resolve_upstream(
        TRAIN, [other, edge("a.dependency.", "dependency.")], {"a": UpstreamResult()}
    )
    assert not values.inputs
    assert not values.unmet
