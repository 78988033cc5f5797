"""Nothing in a valohai.yaml is ignored silently: each key without effect is named, for the steps it concerns."""

from __future__ import annotations

import pytest

from valohai_dagster.projects.lint import CheckedConfig, check_config

STEPS = """
- step:
    name: a
    image: i
    command: c
- step:
    name: ab
    image: i
    command: c
    inputs: [{name: x, optional: true}]
    parameters: [{name: p, type: integer, default: 1}]
- step:
    name: alone
    image: i
    command: c
"""

PIPELINE = """
- pipeline:
    name: all
    reuse-executions: true
    parameters:
      - {name: size, target: two.parameter.p, default: 3}
    nodes:
      - name: one
        type: execution
        step: a
        on-error: continue
        override:
          image: other
          command: other
        actions:
          - {when: node-complete, then: stop-pipeline}
      - {name: two, type: task, step: ab, on-error: stop-next}
      - {name: old, type: execution, step: alone, commit: abc}
      - {name: serve, type: deployment, deployment: d, endpoints: [e]}
    edges:
      - source: one.output.*
        target: two.input.x
        configuration: {x: 1}
      - [one.output.*, serve.file.e.f]
"""


def check(text: str) -> CheckedConfig:
    checked = check_config(text)
    assert checked.config is not None, [str(problem) for problem in checked.problems]
    return checked


def told(checked: CheckedConfig, *words: str) -> tuple[int | None, tuple[str, ...]]:
    """Line and steps of the one note that holds all words."""
    found = [p for p in checked.unsupported if all(word in p.message for word in words)]
    assert len(found) == 1, (words, [str(problem) for problem in checked.unsupported])
    assert found[0] in checked.problems
    return found[0].line, found[0].steps


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("icon", "rocket"),
        ("cache-volumes", "[v]"),
        ("runtime-config-preset", "p"),
        ("resources", "{cpu: {min: 1}}"),
    ],
)
def test_keys_of_a_step_concern_that_step(key: str, value: str) -> None:
    checked = check(
        f"- step:\n    name: s\n    image: i\n    command: c\n    environment: e\n    {key}: {value}\n"
    )
    assert told(checked, f"`{key}` has no effect") == (6, ("s",))


def test_a_parameter_widget_is_named() -> None:
    parameters = "    parameters:\n      - {name: p, type: string, widget: textarea}\n"
    checked = check(f"- step:\n    name: s\n    image: i\n    command: c\n{parameters}")
    assert told(checked, "parameter `p`", "`widget`") == (6, ("s",))


def test_keys_that_ask_for_nothing_or_have_an_effect_are_not_named() -> None:
    outputs = "    outputs: [{name: model, description: d}]\n    autorestart: true\n"
    assert not check(f"- step:\n    name: s\n    image: i\n    command: c\n{outputs}").unsupported


def test_a_task_concerns_its_step_and_names_its_keys() -> None:
    task = "- task: {name: t, step: ab, type: grid_search, parameters: [{name: p, style: multiple, rules: {items: [1]}}]}\n"
    checked = check(STEPS + task)
    assert told(checked, "task `t`", "`type`", "`parameters`") == (16, ("ab",))


def test_endpoints_deployments_and_unknown_siblings_concern_the_whole_project() -> None:
    checked = check(
        STEPS
        + "- endpoint: {name: predict, image: i, port: 8000, server-command: x}\n"
        + "- deployment: {name: d, defaults: {target: x}}\n"
        + "- step: {name: z, image: i, command: c}\n  owner: me\n"
    )
    assert told(checked, "endpoint `predict`") == (16, ())
    assert told(checked, "deployment `d`") == (17, ())
    assert told(checked, "`owner`") == (19, ("z",))


def test_keys_of_a_pipeline_concern_the_steps_of_their_place() -> None:
    checked = check(STEPS + PIPELINE)
    assert told(checked, "`reuse-executions`") == (19, ("a", "ab", "alone"))
    assert told(checked, "parameter `size`") == (21, ("ab",))
    assert told(checked, "node `one`", "`on-error: continue`") == (26, ("a",))
    assert told(checked, "node `one`", "`override` of `image`, `command`") == (27, ("a",))
    assert told(checked, "node `one`", "`actions`") == (30, ("a",))
    assert told(checked, "node `two`", "`type: task`") == (32, ("ab",))
    assert told(checked, "node `old`", "`commit`") == (33, ("alone",))
    assert told(checked, "node `serve`") == (34, ("a",))
    assert told(checked, "`configuration`") == (38, ("a", "ab"))
    assert len(checked.unsupported) == 9


def test_of_an_item_that_is_defined_twice_only_the_last_one_is_told() -> None:
    step = "- step: {name: s, image: i, command: c, icon: x}\n"
    assert len(check(step + step).unsupported) == 1


def test_problems_of_the_check_know_their_steps_by_place_not_by_name() -> None:
    """`a` is part of `ab`'s name and of every message; the warning is about `ab` alone."""
    bad = STEPS.replace("default: 1", "max: 3, default: 5")
    found = [p for p in check(bad).problems if p.level == "warning"]
    assert [(p.steps, p.concerns("a"), p.concerns("ab")) for p in found] == [(("ab",), False, True)]


def test_a_key_that_is_given_twice_concerns_the_step_that_holds_it() -> None:
    doubled = STEPS.replace("name: alone\n    image: i", "name: alone\n    image: i\n    image: j")
    assert [p.steps for p in check(doubled).problems] == [("alone",)]


def test_unknown_items_concern_the_whole_project() -> None:
    problems = check("- definitions: {x: 1}\n" + STEPS).problems
    assert [problem.concerns("alone") for problem in problems] == [True]


def test_y100_a_warning_about_an_action_stands_at_that_action() -> None:
    odd = PIPELINE.replace("then: stop-pipeline", "then: require-approval")
    found = [p for p in check(STEPS + odd).problems if p.level == "warning"]
    assert [(p.line, p.steps) for p in found] == [(31, ("a",))]
    assert "node `one`" in found[0].message
