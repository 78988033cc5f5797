"""From a step, launch values and edges to an ExecutionSpec."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from valohai_yaml.objs import Step

from valohai_agent.protocol import RemoteDebug
from valohai_dagster.errors import SpecError
from valohai_dagster.executions.access import Launcher
from valohai_dagster.executions.spec import LaunchIds, StepConfig, build_spec
from valohai_dagster.executions.spec_model import CommitRef, ExecutionSpec
from valohai_dagster.projects.step import StepDefinition
from valohai_dagster.projects.upstream import InputFeed, UpstreamValues

COMMIT = CommitRef(
    identifier="abc", archive_store="local", archive_key="k", archive_sha256="0" * 64
)
IDS = LaunchIds(
    execution_id="e", run_id="r", step_key="s", asset_key=("p", "s"), log_key=("r", "s")
)


def define(**more: Any) -> StepDefinition:
    step = Step.parse({"name": "s", "image": "python:3.11", "command": "run {parameters}", **more})
    return StepDefinition(project="p", step=step, asset_name="s")


def build(
    definition: StepDefinition, upstream: UpstreamValues | None = None, **config: Any
) -> ExecutionSpec:
    return build_spec(
        definition,
        StepConfig(**config),
        commit=COMMIT,
        ids=IDS,
        upstream=upstream or UpstreamValues(),
    )


def problems(
    definition: StepDefinition, upstream: UpstreamValues | None = None, **config: Any
) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        build(definition, upstream, **config)
    return caught.value.problems


def test_everything_of_the_step_and_the_launch_is_in_the_spec() -> None:
    definition = define(
        parameters=[{"name": "n", "type": "integer", "default": 1}],
        inputs=[{"name": "i", "default": ["http://x/a", "http://x/b"], "keep-directories": "suffix", "filename": "f", "download": "on-demand"}],
        mounts=["/data:/mnt", {"source": "nfs:/x", "destination": "/y", "type": "NFS", "readonly": True, "options": {"a": 1, "b": None}}],
        environment="gpu",
        **{
            "environment-variables": [{"name": "A", "default": "1"}, {"name": "B"}, {"name": "C", "optional": False}],
            "environment-variable-groups": ["g"],
            "upload-store": "s3",
            "time-limit": 60,
            "no-output-timeout": "1h",
        },
    )  # fmt: skip
    spec = build(
        definition, tags=["x", "x", "y"], title="T", environment_variables={"B": "2"}, priority=3
    )
    assert (spec.project.name, spec.step, spec.image, spec.commit) == (
        "p",
        "s",
        "python:3.11",
        COMMIT,
    )
    assert spec.commands == ["run --n=1"]
    assert spec.parameters == {"n": 1}
    (given,) = spec.inputs
    assert given.model_dump() == {
        "name": "i",
        "uris": ["http://x/a", "http://x/b"],
        "optional": False,
        "keep_directories": "suffix",
        "filename": "f",
        "download": "on-demand",
    }
    assert [(m.source, m.destination, m.readonly, m.type, m.options) for m in spec.mounts] == [
        ("/data", "/mnt", False, None, {}),
        ("nfs:/x", "/y", True, "nfs", {"a": 1}),
    ]
    assert (spec.environment, spec.environment_variable_groups) == ("gpu", ["g"])
    assert spec.environment_variables == {"A": "1", "B": "2"}
    assert spec.required_environment_variables == ["C"]
    assert (spec.upload_store, spec.time_limit_seconds, spec.no_output_timeout_seconds) == (
        "s3",
        60,
        3600,
    )
    assert (spec.tags, spec.title, spec.priority, spec.asset_key) == (
        ["x", "y"],
        "T",
        3,
        ["p", "s"],
    )
    assert ExecutionSpec.model_validate_json(spec.model_dump_json()) == spec


def test_launch_values_beat_the_step() -> None:
    definition = define(
        environment="cpu",
        **{"time-limit": 60, "environment-variable-groups": ["g"], "environment-variables": [{"name": "A", "default": "1"}]},
    )  # fmt: skip
    spec = build(
        definition,
        image="other:1",
        environment="gpu",
        time_limit="2m",
        environment_variables={"A": "2", "N": "3"},
        environment_variable_groups=[],
        fail_fast=True,
    )
    assert (spec.image, spec.environment, spec.time_limit_seconds) == ("other:1", "gpu", 120)
    assert spec.environment_variables == {"A": "2", "N": "3"}
    assert spec.environment_variable_groups == []
    assert spec.fail_fast


def test_l31_autorestart_is_the_launchs_else_the_steps() -> None:
    assert not build(define()).autorestart
    assert build(define(autorestart=True)).autorestart
    assert not build(define(autorestart=True), autorestart=False).autorestart
    assert build(define(), autorestart=True).autorestart


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA me@here"


def test_k60_remote_debugging_is_part_of_the_spec() -> None:
    spec = build(define(), remote_debug={"port": 2222, "key": f" {KEY}\n"})
    assert spec.remote_debug == RemoteDebug(port=2222, key=KEY)
    assert build(define()).remote_debug is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"port": 22, "key": KEY}, "port 22 is not a number from 1024 to 65535"),
        ({"port": 65536, "key": KEY}, "port 65536"),
        ({"port": 2222, "key": "me@here"}, "no public key in one line"),
        ({"port": 2222, "key": "ssh-ed25519 not-base64!"}, "no public key in one line"),
        ({"port": 2222, "key": f"{KEY}\n{KEY}"}, "no public key in one line"),
        ({"port": 2222, "key": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blbg"}, "a private key"),
    ],
)
def test_k60_a_bad_port_or_key_is_refused_and_a_private_key_never_shown(
    given: dict[str, Any], words: str
) -> None:
    [problem] = problems(define(), remote_debug=given)
    assert problem.startswith("remote_debug: ")
    assert words in problem
    assert "b3Blbg" not in problem


def test_all_problems_are_told_at_once() -> None:
    definition = define(
        parameters=[{"name": "n", "type": "integer", "max": 3}, {"name": "need"}],
        inputs=[{"name": "data"}],
    )
    found = problems(
        definition,
        parameters={"n": 9, "x": 1},
        inputs={"dta": ["http://x"]},
        environment_variables={"A=B": "1", "VH_JOB_ID": "me", "OK": "a\0b"},
        time_limit="never",
        image="a b",
    )
    text = "\n".join(found)
    for words in ("no parameter `x`", "greater than the maximum", "`need` is required", "no input `dta`: did you mean `data`?", "`data` is required", "'A=B'", "VH_JOB_ID", "NUL", "time limit: 'never'", "'a b' is not an image"):  # fmt: skip
        assert words in text
    assert len(found) == 10


def test_y41_v12_a_required_input_without_a_value_is_refused() -> None:
    definition = define(inputs=[{"name": "data"}, {"name": "maybe", "optional": True}])
    assert problems(definition) == (
        "input `data` is required and has no value: give at least one URI (Y-41)",
    )
    assert problems(definition, inputs={"data": []})[0].startswith("input `data` is required")
    assert problems(definition, inputs={"data": ["", " "]})[0].startswith(
        "input `data` is required"
    )


def test_y41_given_uris_replace_the_default_list_and_every_input_is_listed() -> None:
    definition = define(
        inputs=[{"name": "a", "default": ["http://1", "http://2"]}, {"name": "b", "optional": True}]
    )
    spec = build(definition, inputs={"a": "http://3"})
    assert [(i.name, i.uris) for i in spec.inputs] == [("a", ["http://3"]), ("b", [])]


def test_i04_parameters_in_uris_are_bare_values_without_quotes() -> None:
    definition = define(
        parameters=[{"name": "set", "default": "a b"}, {"name": "n", "type": "integer", "default": 3}, {"name": "o", "optional": True}],
        inputs=[{"name": "i", "default": "store://local/{parameter:set}/{parameter-value:n}/{other}*"}],
    )  # fmt: skip
    assert build(definition).inputs[0].uris == ["store://local/a b/3/{other}*"]
    assert build(definition, parameters={"n": "4"}, inputs={"i": "x://{parameter:n}"}).inputs[
        0
    ].uris == ["x://4"]
    assert (
        "no parameter `nn`: did you mean `n`?"
        in problems(definition, inputs={"i": "x://{parameter:nn}"})[0]
    )
    assert (
        "parameter `o` has no value" in problems(definition, inputs={"i": "x://{parameter:o}"})[0]
    )


INPUT = {"name": "data", "default": "http://default"}


def fed(mode: str = "replace", *uris: str) -> UpstreamValues:
    feed = InputFeed(uris=uris or ("datum://1", "datum://{parameter:x}"), merge_mode=mode)  # type: ignore[arg-type]
    return UpstreamValues(inputs={"data": feed})


def test_p12_p13_edges_replace_or_join_the_defaults_and_are_not_interpolated() -> None:
    definition = define(inputs=[INPUT])
    assert build(definition, fed()).inputs[0].uris == ["datum://1", "datum://{parameter:x}"]
    assert build(definition, fed("append", "datum://1")).inputs[0].uris == [
        "http://default",
        "datum://1",
    ]
    assert build(definition, fed(), inputs={"data": "http://mine"}).inputs[0].uris == [
        "http://mine"
    ]


def test_y42_an_edge_satisfies_a_required_input() -> None:
    assert build(define(inputs=[{"name": "data"}]), fed()).inputs[0].uris[0] == "datum://1"


def test_p14_an_edge_problem_counts_unless_the_launch_gives_the_input() -> None:
    definition = define(inputs=[{"name": "data"}])
    upstream = UpstreamValues(
        inputs={"data": InputFeed(uris=())}, problems={("input", "data"): ("matched no files",)}
    )
    assert problems(definition, upstream) == ("matched no files",)
    assert build(definition, upstream, inputs={"data": "http://x"}).inputs[0].uris == ["http://x"]


def test_an_upstream_that_never_ran_is_named_when_nothing_else_fills_the_gap() -> None:
    upstream = UpstreamValues(unmet={("input", "data"): ("prep",), ("parameter", "n"): ("prep",)})
    bare = define(inputs=[{"name": "data"}], parameters=[{"name": "n"}])
    assert [("`prep` was never materialized" in words) for words in problems(bare, upstream)] == [
        True,
        True,
    ]
    spec = build(define(inputs=[INPUT], parameters=[{"name": "n", "default": "1"}]), upstream)
    assert [w for w in spec.warnings if "uses its default" in w and "`prep`" in w] == spec.warnings
    assert len(spec.warnings) == 2
    assert build(bare, upstream, inputs={"data": "http://x"}, parameters={"n": "1"}).warnings == []


def test_edge_parameters_are_cast_and_launch_values_beat_them() -> None:
    definition = define(parameters=[{"name": "n", "type": "integer", "max": 5}])
    assert build(definition, UpstreamValues(parameters={"n": "4"})).parameters == {"n": 4}
    assert build(
        definition, UpstreamValues(parameters={"n": "4"}), parameters={"n": 2}
    ).parameters == {"n": 2}
    assert "maximum" in problems(definition, UpstreamValues(parameters={"n": 6}))[0]
    broken = UpstreamValues(problems={("parameter", "n"): ("found no value",)})
    assert "found no value" in problems(definition, broken)
    assert build(definition, broken, parameters={"n": 1}).parameters == {"n": 1}


def test_p19_edges_fill_variables_below_launch_values() -> None:
    upstream = UpstreamValues(environment_variables={"A": "edge", "B": "edge"})
    spec = build(
        define(**{"environment-variables": [{"name": "A", "default": "step"}]}),
        upstream,
        environment_variables={"B": "me"},
    )
    assert spec.environment_variables == {"A": "edge", "B": "me"}


def test_keys_without_effect_and_notes_on_the_file_are_in_the_warnings() -> None:
    definition = replace(define(), unsupported=("`icon` has no effect",), notes=("line 3: odd",))
    assert build(definition).warnings == ["`icon` has no effect", "line 3: odd"]
    back = StepDefinition.from_json(definition.to_json())
    assert (back.unsupported, back.notes) == (definition.unsupported, definition.notes)


def test_a_step_definition_travels_as_json() -> None:
    definition = define(
        parameters=[{"name": "é", "type": "flag", "default": True, "pass-false-as": "--no"}, {"name": "m", "multiple": "separate", "multiple-separator": ";", "default": [1]}],
        inputs=[{"name": "i", "default": ["a"], "keep-directories": True, "download": "on-demand"}],
        resources={"devices": {}},
        **{"time-limit": 90, "source-path": "a.py", "environment-variables": [{"name": "A", "optional": False}]},
    )  # fmt: skip
    back = StepDefinition.from_json(definition.to_json())
    assert back == definition
    assert back.step.serialize() == definition.step.serialize()
    assert build(back, parameters={"é": False}) == build(definition, parameters={"é": False})


def test_a_step_definition_of_a_newer_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 99"):
        StepDefinition.from_dict({"v": 99})


@pytest.mark.parametrize(
    ("launch", "step", "project", "chosen"),
    [
        ("a", "b", "c", "a"),
        (None, "b", "c", "b"),
        (None, None, "c", "c"),
        (None, None, None, None),  # the execution service knows the deployment's
        ("a", None, None, "a"),
    ],
)
def test_o15_the_launch_chooses_the_store_then_the_step_then_the_project(
    launch: str | None, step: str | None, project: str | None, chosen: str | None
) -> None:
    made = build_spec(
        define(**({"upload-store": step} if step else {})),
        StepConfig(upload_store=launch),
        commit=COMMIT,
        ids=IDS,
        upload_store=project,
    )
    assert made.upload_store == chosen


def test_the_spec_says_who_launched_it() -> None:
    launcher = Launcher(user="ann", teams=("vision", "nlp"), organization="acme")
    made = build_spec(define(), StepConfig(), commit=COMMIT, ids=replace(IDS, launcher=launcher))
    assert (made.creator, made.teams, made.organization) == ("ann", ["vision", "nlp"], "acme")
