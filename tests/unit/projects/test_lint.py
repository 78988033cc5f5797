"""Broken valohai.yaml files: every problem with its line and a hint."""

from __future__ import annotations

from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_dagster.projects.lint import CheckedConfig, check_config

STEP = "- step:\n    name: s\n    image: i\n    command: c\n"


def check(text: str) -> CheckedConfig:
    return check_config(dedent(text).lstrip("\n"))


def found(checked: CheckedConfig, level: str = "error") -> list[tuple[int | None, str]]:
    return [(p.line, str(p)) for p in checked.problems if p.level == level]


def test_all_problems_of_a_file_are_found_at_once_with_line_and_hint() -> None:
    checked = check(
        """
        - step:
            name: train
            image: python:3.11
            comand: run
            command: python train.py
            parameters:
              - name: lr
                type: float
                min: 1e-6
              - name: mode
                type: intger
            environment-variables:
              - name: A
                default: 1
        - step:
          name: x
        """
    )
    assert checked.config is None
    lines = found(checked)
    assert [line for line, _ in lines] == [4, 9, 11, 14, 15]
    assert "did you mean `command`?" in lines[0][1]
    assert "write `1.0e-6`" in lines[1][1]
    assert "'intger' is not one of" in lines[2][1]
    assert "parameters[1] `mode`" in lines[2][1]
    assert "quote it to make it text: '1'" in lines[3][1]
    assert "indent the keys of `step` deeper" in lines[4][1]


def test_semantic_errors_point_at_the_node_edge_or_key() -> None:
    checked = check(
        """
        - step:
            name: train
            image: i
            command: c
            stop-condition: "a +"
            runtime-config-preset: big
        - pipeline:
            name: p
            nodes:
              - {name: a, type: execution, step: train}
              - name: b
                type: execution
                step: gone
            edges:
              - [a.output.*, b.input.x]
              - [x.output.*, b.input.x]
              - source: a.wrong.y
                target: b.input.x
              - [a.output.*, b.zoo.z]
        """
    )
    assert [line for line, _ in found(checked)] == [5, 6, 11, 16, 17, 19]
    assert all("hint:" in words for _, words in found(checked))


def test_y106_a_library_crash_is_reported_as_the_error_it_hides() -> None:
    checked = check(
        """
        - pipeline:
            name: p
            nodes: [{name: a, type: execution, step: gone}]
            edges: []
            parameters: [{name: x, target: a.parameter.y}]
        """
    )
    assert len(found(checked)) == 1
    assert 'step "gone" does not exist' in found(checked)[0][1]


def test_y06_an_unknown_key_that_only_raises_while_parsing_has_a_line() -> None:
    checked = check(STEP + "- deployment:\n    name: d\n    foo: 1\n")
    assert found(checked) == [(5, "line 5: deployment `d` cannot be read: unknown key `foo`")]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", None, "the file is empty"),
        ("# only a comment\n", None, "the file is empty"),
        ("a: b", 1, "must be a list of items, it is a mapping"),
        ("just text", 1, "it is a single value"),
        ("- step:\n\tname: x", 2, "tabs"),
        ("- a: [1\n- b", 2, "expected ',' or ']'"),
        ("- a: b: c", 1, "quote a value that holds"),
        ("- a: 2020-13-45", None, "month must be in 1..12"),
        ("- &a [*a]", None, "contains it"),
        ("- *nope", 1, "define the anchor"),
        ("- !!python/object/apply:os.system [id]", 1, "remove the `!tag`"),
        ("- just text", 1, "not a mapping"),
        ("- step: {name: x}\n---\n- b", 2, "one file holds one document"),
        ("[" * 5000, None, "nested too deeply"),
        ("- a: '" + "x" * 5_000_001 + "'", None, "bytes"),
    ],
)
def test_broken_yaml_is_one_clear_error(text: str, line: int | None, words: str) -> None:
    problems = check_config(text).problems
    assert [problem.level for problem in problems] == ["error"]
    assert problems[0].line == line
    assert words in str(problems[0])


def test_text_that_is_not_utf8_is_refused_with_its_line() -> None:
    assert "line 2 is not UTF-8" in str(check_config(b"- step:\n  name: \xff").problems[0])
    assert check_config(("\ufeff" + STEP).encode()).config is not None


def test_aliases_that_explode_are_refused_quickly() -> None:
    lines = ["- &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"- &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "aliases expand" in str(check_config("\n".join(lines)).problems[0])


def test_y03_unknown_items_are_tolerated_and_anchors_work() -> None:
    checked = check(
        """
        - definitions:
            image: &image python:3.11
            common: &common
              environment: gpu
        - step:
            <<: *common
            name: s
            image: *image
            command: c
        """
    )
    assert checked.config is not None
    assert checked.config.steps["s"].image == "python:3.11"
    assert checked.config.steps["s"].environment == "gpu"
    assert [problem.level for problem in checked.problems] == ["note"]
    assert found(check(STEP + "- stp: {}\n"), "warning")[0][1].endswith("did you mean `step`?)")


def test_y04_y05_double_definitions_are_warnings_and_the_last_one_wins() -> None:
    checked = check(STEP + "- step: {name: s, image: j, command: c}\n  task: {}\n")
    assert checked.config is None or checked.config.steps["s"].image == "j"
    assert (5, "line 5: step `s` is defined again; the last definition counts (Y-05)") in found(
        check(STEP + STEP.replace("image: i", "image: j")), "warning"
    )
    doubled = check(STEP + "    image: j\n")
    assert doubled.config is not None
    assert doubled.config.steps["s"].image == "j"
    assert found(doubled, "warning")[0] == (
        5,
        "line 5: key `image` is given twice; the last one counts",
    )


def test_y103_plural_sockets_are_read_with_a_warning() -> None:
    checked = check(
        """
        - step: {name: s, image: i, command: c, inputs: [{name: x, optional: true}]}
        - pipeline:
            name: p
            nodes:
              - {name: a, type: execution, step: s}
              - {name: b, type: execution, step: s}
            edges:
              - [a.outputs.*, b.inputs.x]
        """
    )
    assert checked.config is not None
    assert checked.config.pipelines["p"].edges[0].target == "b.input.x"
    assert [line for line, _ in found(checked, "warning")] == [8, 8]


def test_y19_durations_are_checked_with_their_line_and_digit_only_text_is_seconds() -> None:
    checked = check(STEP + '    time-limit: "30"\n    no-output-timeout: 1h\n')
    assert checked.config is not None
    step = checked.config.steps["s"]
    assert step.time_limit is not None
    assert step.time_limit.total_seconds() == 30
    assert step.no_output_timeout is not None
    bad = check(STEP + "    time-limit: 0\n    no-output-timeout: 5x\n")
    assert [line for line, _ in found(bad)] == [5, 6]


def test_y34_numbers_that_yaml_reads_as_text_become_numbers() -> None:
    checked = check(
        STEP + "    parameters: [{name: lr, type: float, default: 1e-5, choices: [1e-5, 1.0e-4]}]\n"
    )
    assert checked.config is not None
    parameter = checked.config.steps["s"].parameters["lr"]
    assert parameter.default == 1e-5
    assert parameter.choices == [1e-5, 1e-4]
    assert not checked.problems


def test_y35_a_default_outside_its_rules_is_a_warning_at_the_default() -> None:
    checked = check(
        STEP
        + "    parameters:\n      - name: n\n        type: integer\n        max: 3\n        default: 5\n"
    )
    assert checked.config is not None
    assert [line for line, _ in found(checked, "warning")] == [9]


@given(st.text(alphabet="-: []{}&*a1\n'\"!|>#%@`,?stepnam", max_size=80))
def test_no_text_makes_the_check_itself_fail(text: str) -> None:
    checked = check_config(text)
    assert checked.config is not None or checked.problems


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["step", "pipeline", "name", "nodes", "edges", "parameters", "task", "x"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_no_data_makes_the_check_itself_fail(data: object) -> None:
    import yaml

    checked = check_config(yaml.safe_dump(data))
    assert checked.config is not None or checked.problems
