"""The Launchpad's form of a step."""

from __future__ import annotations

from typing import Any

import dagster as dg
import pytest
from dagster._config import process_config, resolve_to_config_type

from tests.support.dagster_face import project_of
from valohai_dagster.plugin.config_schema import config_schema, step_config, written_config
from valohai_dagster.projects.step import StepDefinition

STEP = """
- step:
    name: train
    image: python:3.11
    command: python train.py {parameters}
    parameters:
      - {name: rows, type: integer, default: 100, min: 1, max: 1000, description: How many}
      - {name: learning-rate, type: float, default: "1e-3"}
      - {name: verbose, type: flag, default: true}
      - {name: optimizer, type: string, default: adam, choices: [adam, sgd]}
      - {name: size, type: integer, choices: [1, 2], default: 2}
      - {name: layers, type: integer, multiple: repeat, default: [8, 4]}
      - {name: label, type: string, optional: true}
      - {name: seed, type: integer}
    inputs:
      - {name: data, default: ["https://example.com/a.csv", "https://example.com/b.csv"]}
      - {name: model}
      - {name: extra, optional: true}
    environment-variables:
      - {name: TOKEN, optional: false}
"""


@pytest.fixture
def step() -> StepDefinition:
    return project_of(STEP).steps["train"]


def resolve(schema: Any, value: Any) -> Any:
    return process_config(resolve_to_config_type(schema), value)


def valid(value: dict[str, Any]) -> dict[str, Any]:
    parameters = {"seed": 1, **value.get("parameters", {})}
    inputs = {"model": ["datum://m"], **value.get("inputs", {})}
    return {**value, "parameters": parameters, "inputs": inputs}


def test_defaults_come_typed(step: StepDefinition) -> None:
    """Y-34: a YAML 1.1 text such as 1e-3 becomes a number."""
    result = resolve(config_schema(step), valid({}))
    assert result.success, result.errors
    assert result.value["parameters"] == {
        "rows": 100,
        "learning-rate": 0.001,
        "verbose": True,
        "optimizer": "adam",
        "size": 2,
        "layers": [8, 4],
        "seed": 1,
    }
    assert result.value["inputs"]["data"] == [
        "https://example.com/a.csv",
        "https://example.com/b.csv",
    ]


def test_credentials_in_a_default_are_not_in_the_schema_and_come_back_from_the_launchpad() -> None:
    url = "https://me:hunter2@example.com/a.csv?temp_url_sig=hunter3"
    step = project_of(
        "- step: {name: s, image: i, command: c, inputs: "
        f"[{{name: data, default: ['{url}', 's3://b/x']}}]}}"
    ).steps["s"]
    for fed in (frozenset[tuple[str, str]](), frozenset({("input", "data")})):
        schema: Any = config_schema(step, fed=fed)
        field = schema.fields["inputs"].config_type.fields["data"]
        assert (
            "hunter" not in f"{field.description} {field.default_provided and field.default_value}"
        )
    resolved = resolve(config_schema(step), {}).value
    assert "hunter" not in str(resolved)
    assert step_config(step, resolved).inputs == {}, "nobody has chosen anything"
    assert step_config(step, resolved, resolved).inputs == {"data": [url, "s3://b/x"]}


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ({"rows": "many"}, "rows"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"unknown": 1}, "unknown"),
        ({"layers": 3}, "layers"),
        ({"verbose": "x"}, "verbose"),
    ],
)
def test_wrong_values_are_refused_and_named(
    step: StepDefinition, parameters: dict[str, Any], part: str
) -> None:
    result = resolve(config_schema(step), valid({"parameters": parameters}))
    assert not result.success
    assert part in str(result.errors)


def test_y36_a_parameter_without_value_is_required(step: StepDefinition) -> None:
    result = resolve(config_schema(step), {"inputs": {"model": ["datum://m"]}})
    assert not result.success
    assert "seed" in str(result.errors)


def test_y41_an_input_without_uri_is_required_unless_an_edge_feeds_it(step: StepDefinition) -> None:
    assert not resolve(config_schema(step), {"parameters": {"seed": 1}}).success
    fed = frozenset({("input", "model"), ("parameter", "seed")})
    assert resolve(config_schema(step, fed=fed), {}).success


def test_y39_null_leaves_a_parameter_out(step: StepDefinition) -> None:
    given = valid({"parameters": {"rows": None}})
    resolved = resolve(config_schema(step), given).value
    assert step_config(step, resolved, given).parameters["rows"] is None


def test_bounds_choices_and_requirements_stand_in_the_descriptions(step: StepDefinition) -> None:
    schema: Any = config_schema(step)
    fields = schema.fields["parameters"].config_type.fields
    assert fields["rows"].description == "How many. At least 1, at most 1000. Default: 100."
    assert "One of: 1, 2." in fields["size"].description
    assert "TOKEN, required" in schema.fields["environment_variables"].description


def test_a_default_is_not_a_choice(step: StepDefinition) -> None:
    """So that an upstream asset, or another commit's YAML, can replace it."""
    resolved = resolve(config_schema(step), valid({})).value
    config = step_config(step, resolved, valid({}))
    assert config.parameters == {"seed": 1}
    assert config.inputs == {"model": ["datum://m"]}
    given = valid({"parameters": {"rows": 100}})
    assert step_config(step, resolved, given).parameters == {"rows": 100, "seed": 1}


def test_the_launchpad_writes_out_defaults_but_none_that_an_upstream_may_replace() -> None:
    step = project_of(
        """
- step:
    name: train
    image: python:3.11
    command: python train.py {parameters}
    parameters:
      - {name: rows, type: integer, default: 100}
      - {name: colour, type: string, default: red, choices: [red, green]}
      - {name: rate, type: float, default: 0.5}
    inputs:
      - {name: data, default: "https://example.com/a.csv"}
      - {name: model, default: "https://example.com/m"}
"""
    ).steps["train"]
    fed = frozenset({("input", "model"), ("parameter", "rate")})
    written: Any = dg.Field(config_schema(step, fed=fed)).default_value
    assert written["parameters"] == {"rows": 100, "colour": "red"}
    assert written["inputs"] == {"data": ["https://example.com/a.csv"]}


def test_names_with_spaces_and_dots_are_fine() -> None:
    step = project_of(
        """
- step:
    name: odd
    image: x
    command: x
    parameters: [{name: "a b.c", default: "1"}]
"""
    ).steps["odd"]
    given = {"parameters": {"a b.c": "2"}}
    resolved = resolve(config_schema(step), given).value
    assert step_config(step, resolved, given).parameters == {"a b.c": "2"}


@pytest.mark.parametrize("choices", [["1", "2"], ["true", "x"], ["no", "yes"]])
def test_choices_that_yaml_reads_as_other_types_stay_plain_text(choices: list[str]) -> None:
    step = project_of(
        f"""
- step:
    name: s
    image: x
    command: x
    parameters: [{{name: c, type: string, choices: {choices!r}, default: {choices[0]!r}}}]
"""
    ).steps["s"]
    assert resolve(config_schema(step), {"parameters": {"c": choices[1]}}).success


def test_a_bad_default_does_not_break_loading() -> None:
    step = project_of(
        """
- step:
    name: s
    image: x
    command: x
    parameters: [{name: n, type: integer, default: many}]
"""
    ).steps["s"]
    assert resolve(config_schema(step), {}).success


def test_the_written_config_is_found_by_op_path() -> None:
    run_config = {"ops": {"graph": {"ops": {"train": {"config": {"title": "x"}}}}}}
    assert written_config(run_config, ["graph", "train"]) == {"title": "x"}
    assert written_config(run_config, ["other"]) == {}
    assert written_config({}, ["train"]) == {}


def test_every_project_of_one_location_may_have_the_same_step_names() -> None:
    first, second = (project_of(STEP, name=name).steps["train"] for name in ("a", "b"))
    schemas: list[Any] = [config_schema(s) for s in (first, second)]
    one, two = (s.fields["parameters"].config_type.fields["optimizer"] for s in schemas)
    assert one.config_type.key != two.config_type.key
    assert isinstance(config_schema(first), dg.Shape)


def test_k72_groups_limits_priority_and_fail_fast_are_set_at_launch(step: StepDefinition) -> None:
    given = valid(
        {
            "environment_variable_groups": ["prod"],
            "time_limit": "1h 30m",
            "no_output_timeout": 90,
            "priority": 5,
            "fail_fast": True,
            "remote_debug": {"port": 2222, "key": "ssh-ed25519 AAAA"},
        }
    )
    result = resolve(config_schema(step), given)
    assert result.success, result.errors
    config = step_config(step, result.value, given)
    assert config.environment_variable_groups == ["prod"]
    assert (config.time_limit, config.no_output_timeout) == ("1h 30m", 90)
    assert (config.priority, config.fail_fast) == (5, True)
    assert config.remote_debug == {"port": 2222, "key": "ssh-ed25519 AAAA"}


def test_l31_autorestart_is_chosen_in_the_launchpad(step: StepDefinition) -> None:
    schema: Any = config_schema(step)
    for given, expected in (({}, None), ({"autorestart": True}, True)):
        resolved = resolve(schema, valid(given)).value
        assert step_config(step, resolved, given).autorestart is expected
    assert "Default: False." in schema.fields["autorestart"].description


def test_k72_groups_that_are_not_given_are_the_steps_and_an_empty_list_is_none_of_them(
    step: StepDefinition,
) -> None:
    for given, expected in (({}, None), ({"environment_variable_groups": []}, [])):
        resolved = resolve(config_schema(step), valid(given)).value
        config = step_config(step, resolved, given)
        assert config.environment_variable_groups == expected
        assert (config.time_limit, config.no_output_timeout) == (None, None)
        assert (config.priority, config.fail_fast) == (0, False)
        assert config.remote_debug is None


def test_o15_the_store_of_outputs_is_chosen_in_the_launchpad(step: StepDefinition) -> None:
    schema: Any = config_schema(step, upload_store="models")
    given = valid({"upload_store": "archive"})
    assert step_config(step, resolve(schema, given).value, given).upload_store == "archive"
    assert step_config(step, resolve(schema, valid({})).value, {}).upload_store is None
    assert "Default: models;" in schema.fields["upload_store"].description
    schema = config_schema(step)
    assert "Default: that of the deployment;" in schema.fields["upload_store"].description
