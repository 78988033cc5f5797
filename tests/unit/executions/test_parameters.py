"""Parameters and commands: the vectors of CONTRACT 17.1 and 17.2 and rules Y-34 to Y-39, C-01 to C-14."""

from __future__ import annotations

import math
from datetime import date
from typing import Any

import pytest
from valohai_yaml.excs import ValidationErrors
from valohai_yaml.objs import Step
from valohai_yaml.objs.parameter import Parameter

from valohai_dagster.executions.parameters import build_commands, resolve_parameters


def step(
    parameters: list[dict[str, Any]], command: str | list[str] = "run {parameters}", **more: Any
) -> Step:
    return Step.parse(
        {"name": "s", "image": "i", "command": command, "parameters": parameters, **more}
    )


def resolved(parameters: list[dict[str, Any]], **given: Any) -> tuple[dict[str, Any], list[str]]:
    problems: list[str] = []
    return resolve_parameters(step(parameters), given, problems), problems


FLAG = {"name": "f", "type": "flag"}
NO_F = {**FLAG, "pass-false-as": "--no-f"}
SEPARATE = {"name": "x", "multiple": "separate"}
NOTHING: dict[str, Any] = {}

VECTORS_171: list[tuple[list[dict[str, Any]], str, dict[str, Any], str]] = [
    ([{"name": "lr", "type": "float", "default": 1e-05}], "run {parameters}", NOTHING, "run --lr=1e-05"),
    ([{"name": "m", "default": "it's"}], "run {parameters}", NOTHING, "run '--m=it'\"'\"'s'"),
    ([{"name": "m", "default": "a b"}], "run -m {parameter-value:m}", NOTHING, "run -m 'a b'"),
    ([{"name": "m", "default": "a b", "pass-as": "-m {v}"}], "run {parameter:m}", NOTHING, "run -m 'a b'"),
    ([FLAG], "run {parameters}", {"f": True}, "run --f"),
    ([FLAG], "run {parameters}", {"f": False}, "run"),
    ([NO_F], "run {parameters}", {"f": False}, "run --no-f"),
    ([NO_F], "run {parameters}", {"f": True}, "run"),
    ([{"name": "x", "multiple": "repeat", "default": ["a", "b"]}], "run {parameters}", NOTHING, "run --x=a --x=b"),
    ([{**SEPARATE, "multiple-separator": ":", "default": [1, 2]}], "run {parameters}", NOTHING, "run --x=1:2"),
    ([SEPARATE], "run {parameters}", {"x": []}, "run"),
    ([{"name": "x", "default": "d"}], "run {parameters}", {"x": None}, "run"),
    ([{"name": "x", "type": "integer", "default": 5}], "run {parameters}", {"x": 0}, "run --x=0"),
    ([], "run {parameters} {nope} ${HOME} {parameter:zz}", NOTHING, "run  {nope} ${HOME} {parameter:zz}"),
    ([{"name": "b", "type": "integer", "default": 1}, {"name": "a", "type": "integer", "default": 2}], "run {parameters}", {"a": 9, "b": 8}, "run --b=8 --a=9"),
    ([{"name": "x", "type": "integer", "default": 1}], "echo '{\"k\": 1}' {parameter-value:x}", NOTHING, "echo '{\"k\": 1}' 1"),
    ([{"name": "x"}], "run {parameters}", {"x": True}, "run --x=True"),
    ([{"name": "x", "default": "ä"}], "run {parameters}", NOTHING, "run '--x=ä'"),
    ([{"name": "x", "default": ""}], "run {parameters}", NOTHING, "run --x="),
    ([{"name": "mm", "multiple": "repeat", "default": ["a", "b c"], "pass-as": "--mm {v}"}], "run {parameters}", NOTHING, "run --mm a --mm 'b c'"),
]  # fmt: skip


@pytest.mark.parametrize(("parameters", "command", "given", "expected"), VECTORS_171)
def test_171_commands_are_built_as_the_library_does(
    parameters: list[dict[str, Any]], command: str, given: dict[str, Any], expected: str
) -> None:
    subject = step(parameters, command)
    assert subject.build_command(given) == [expected]
    problems: list[str] = []
    assert build_commands(subject, resolve_parameters(subject, given, problems)) == [expected]
    assert not problems


def test_c10_a_flag_default_reaches_the_command_which_the_library_alone_ignores() -> None:
    subject = step([{**FLAG, "default": True}])
    assert subject.build_command({}) == ["run"]
    assert build_commands(subject, resolve_parameters(subject, {}, [])) == ["run --f"]


def test_c04_a_placeholder_without_a_value_stays_and_lists_are_joined() -> None:
    parameters = [
        {"name": "none", "optional": True},
        {"name": "sep", "multiple": "separate", "multiple-separator": ";", "default": ["a", "b"]},
        {"name": "rep", "multiple": "repeat", "default": ["a", "b"]},
    ]
    subject = step(
        parameters, [f"echo {{parameter-value:{name}}}" for name in ("none", "sep", "rep")]
    )
    values = resolve_parameters(subject, {}, [])
    assert build_commands(subject, values) == [
        "echo {parameter-value:none}",
        "echo 'a;b'",
        "echo 'a b'",
    ]
    assert "none" not in values


def test_c05_source_path_is_quoted_or_left_verbatim() -> None:
    command = "python {source-path}"
    assert build_commands(step([], command, **{"source-path": "my dir/a.py"}), {}) == [
        "python 'my dir/a.py'"
    ]
    assert build_commands(step([], command), {}) == ["python {source-path}"]


def test_c01_values_are_not_interpolated_again() -> None:
    subject = step([{"name": "a", "default": "{parameter:b}"}, {"name": "b", "default": "x"}])
    assert build_commands(subject, resolve_parameters(subject, {}, [])) == [
        "run '--a={parameter:b}' --b=x"
    ]


def test_c08_a_hostile_value_stays_one_argument() -> None:
    subject = step([{"name": "a"}], "run {parameters} {parameter-value:a}")
    values = resolve_parameters(subject, {"a": "$(rm -rf /); `id` '"}, [])
    import shlex

    (command,) = build_commands(subject, values)
    assert shlex.split(command) == ["run", "--a=$(rm -rf /); `id` '", "$(rm -rf /); `id` '"]


@pytest.mark.parametrize(
    ("type_", "value", "expected"),
    [("integer", "5", 5), ("float", "1e3", 1000.0), ("string", 5, 5)],
)
def test_172_values_are_cast(type_: str, value: Any, expected: Any) -> None:
    parameter = {"name": "x", "type": type_}
    assert Parameter.parse(parameter).validate(value) == expected
    values, problems = resolved([parameter], x=value)
    assert values == {"x": expected}
    assert type(values["x"]) is type(expected)
    assert not problems


@pytest.mark.parametrize(
    ("type_", "value", "message"),
    [
        ("integer", 5.0, "5.0 is not an integer"),
        ("integer", True, "True is not an integer"),
        ("integer", "", "No value supplied"),
        ("float", "1,5", "1,5 is not a floating-point number"),
        ("flag", "x", "x is not among the choices allowed ([True, False])"),
    ],
)
def test_172_bad_values_have_the_words_of_the_library(type_: str, value: Any, message: str) -> None:
    parameter = {"name": "x", "type": type_}
    with pytest.raises(ValidationErrors) as caught:
        Parameter.parse(parameter).validate(value)
    assert list(caught.value) == [message]
    assert resolved([parameter], x=value)[1] == [f"parameter `x`: {message}"]


def test_172_nan_is_a_float() -> None:
    assert math.isnan(resolved([{"name": "x", "type": "float"}], x="nan")[0]["x"])


def test_y34_bounds_and_choices_are_checked() -> None:
    parameters = [
        {"name": "n", "type": "integer", "min": 1, "max": 3},
        {"name": "c", "choices": ["a", "b"]},
        {"name": "l"},
        {"name": "m", "multiple": "repeat"},
        {"name": "d"},
    ]
    _, problems = resolved(parameters, n=4, c="z", l=[1, 2], m=[[1]], d={"a": 1})
    assert problems == [
        "parameter `n`: 4 is greater than the maximum allowed (3)",
        "parameter `c`: z is not among the choices allowed (['a', 'b'])",
        "parameter `l`: Only a single value is allowed",
        "parameter `m`: lists within lists are not allowed",
        "parameter `d`: a mapping is not a value",
    ]


def test_y34_defaults_are_cast_too() -> None:
    values, problems = resolved(
        [
            {"name": "lr", "type": "float", "default": "1e-5"},
            {"name": "n", "type": "integer", "default": "7"},
            {"name": "day", "default": date(2026, 1, 2)},
        ]
    )
    assert values == {"lr": 1e-5, "n": 7, "day": "2026-01-02"}
    assert not problems
    assert (
        "default of parameter `n`"
        in resolved([{"name": "n", "type": "integer", "default": "x"}])[1][0]
    )


def test_y32_a_single_value_of_a_multiple_parameter_becomes_a_list() -> None:
    assert resolved([{"name": "m", "multiple": "repeat", "type": "integer"}], m="3")[0] == {
        "m": [3]
    }


def test_y36_a_required_parameter_without_a_value_is_named() -> None:
    _, problems = resolved([{"name": "need"}, {"name": "may", "optional": True}, FLAG])
    assert problems == ["parameter `need` is required and has no value: give it a value"]


def test_y37_an_unknown_parameter_is_refused_with_a_suggestion() -> None:
    _, problems = resolved([{"name": "learning_rate", "default": "1"}], learning_rte=1)
    assert problems == ["step `s` has no parameter `learning_rte`: did you mean `learning_rate`?"]
    assert resolved([], zzz=1)[1] == ["step `s` has no parameter `zzz`: it has none"]


@pytest.mark.parametrize(
    ("word", "value"),
    [("true", True), ("YES", True), (1, True), ("off", False), ("0", False), (False, False)],
)
def test_y38_words_for_flags_become_booleans(word: Any, value: bool) -> None:
    assert resolved([FLAG], f=word) == ({"f": value}, [])


def test_y39_an_explicit_null_removes_the_default() -> None:
    assert resolved([{"name": "x", "default": "d"}, {**FLAG, "default": True}], x=None, f=None) == (
        {},
        [],
    )


def test_a_choice_that_yaml_made_a_number_is_met_by_its_text() -> None:
    assert resolved([{"name": "x", "choices": [1, 2]}], x="2") == ({"x": 2}, [])
    assert resolved([{"name": "x", "choices": [1, 2], "multiple": "repeat"}], x=["1", 2]) == (
        {"x": [1, 2]},
        [],
    )
