"""The op tag: what a driver without user code reads."""

from __future__ import annotations

import json

import dagster as dg
import pytest

from tests.support.dagster_face import TWO_STEPS, project_of
from valohai_dagster.plugin.checks import MetricCheck
from valohai_dagster.plugin.step_tag import RetrySpec, StepTag, read_step_tag, step_tag, tag_at

EXPORTS = """
- step:
    name: prep
    image: a
    command: prep
    parameters:
      - {name: rows, type: integer, default: 1}
- step:
    name: train
    image: a
    command: train {parameters}
    parameters:
      - {name: rows, type: integer, default: 2}
- pipeline:
    name: all
    nodes:
      - {name: prep, type: execution, step: prep}
      - {name: train, type: execution, step: train}
    edges:
      - [prep.parameter.rows, train.parameter.rows]
"""


def tag_of(step: str = "train", text: str = TWO_STEPS, **options: object) -> StepTag:
    project = project_of(text)
    return step_tag(project, project.step(step), code_version="v", **options)  # type: ignore[arg-type]


def test_what_is_written_is_read_again() -> None:
    policy = dg.RetryPolicy(
        max_retries=3, delay=1.5, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.FULL
    )
    check = MetricCheck(name="good", condition="accuracy > 0.9", blocking=True, severity="WARN")
    tag = tag_of(
        retry=policy, checks=[check], partition_parameter="learning-rate", upload_store="models"
    )
    read = read_step_tag(tag.to_text())
    assert read == tag
    assert read.retry is not None
    assert read.retry.policy() == policy
    assert read.checks == (check,)
    assert read.upstream == {"Prepare data": ("digits", "Prepare_data")}
    assert read.parents == (("digits", "Prepare_data"),)
    assert read.step.step.parameters["learning-rate"].default == 0.1


def test_a_policy_without_delay_stays_without() -> None:
    assert RetrySpec.of(dg.RetryPolicy(max_retries=2)).policy() == dg.RetryPolicy(max_retries=2)


def test_values_that_other_steps_take_are_exported() -> None:
    assert read_step_tag(tag_of("prep", EXPORTS).to_text()).exported == {"parameter": ["rows"]}


def test_a_tag_of_an_older_code_location_is_read() -> None:
    old = json.loads(tag_of().to_text())
    for key in ("upstream", "exported", "partition_parameter", "upload_store"):
        del old[key]
    read = read_step_tag(json.dumps(old))
    assert read.upstream == {"Prepare data": ("digits", "Prepare_data")}
    assert read.exported == {}
    assert read.partition_parameter is None
    assert read.upload_store is None


def test_other_steps_still_get_what_they_take_from_another_commit() -> None:
    tag = tag_of("prep", EXPORTS)
    alone = project_of(EXPORTS.partition("- pipeline")[0], commit="b" * 40)
    assert tag_at(tag, alone).exported == {"parameter": ["rows"]}


def test_a_newer_tag_is_refused_with_both_versions() -> None:
    with pytest.raises(ValueError, match="version 99, this side reads 1"):
        read_step_tag('{"v": 99}')


def test_the_tag_at_another_commit_has_its_step_and_keeps_what_was_declared() -> None:
    tag = tag_of(checks=[MetricCheck(name="good", condition="a > 1")], upload_store="models")
    other = project_of(TWO_STEPS.replace("train.py", "train2.py"), commit="b" * 40)
    found = tag_at(tag, other)
    assert found.step.step.command == "python train2.py {parameters}"
    assert found.commit.identifier == "b" * 40
    assert found.code_version.startswith("b" * 13)
    assert found.checks == tag.checks
    assert found.upload_store == "models"
    assert found.asset_key == tag.asset_key
