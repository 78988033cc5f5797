"""Declarations beside valohai.yaml: what they may say, and what is found wrong with them when a project is loaded."""

from __future__ import annotations

from typing import Any

import dagster as dg
import pytest

from tests.support.dagster_face import TWO_STEPS, project_of
from valohai_dagster.errors import ProjectError
from valohai_dagster.plugin.assets import project_assets
from valohai_dagster.plugin.checks import MetricCheck
from valohai_dagster.plugin.step_options import StepOptions, options_by_step

DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-01")
ONCE, TWICE = dg.RetryPolicy(max_retries=1), dg.RetryPolicy(max_retries=2)


def options(**declared: Any) -> dict[str, StepOptions]:
    return options_by_step(project_of(TWO_STEPS), declared)  # type: ignore[arg-type]


def problems(**declared: Any) -> str:
    with pytest.raises(ProjectError) as caught:
        options(**declared)
    return "\n".join(caught.value.problems)


def check(condition: str = "accuracy > 0.9", **values: Any) -> MetricCheck:
    return MetricCheck(**{"name": "good", "condition": condition, **values})


def test_one_value_counts_for_every_step() -> None:
    assert {one.pool for one in options(pool="gpu").values()} == {"gpu"}


def test_a_step_that_is_named_beats_the_rest_by_either_of_its_names() -> None:
    found = options(retry_policy={"*": ONCE, "Prepare_data": TWICE})
    assert (found["Prepare data"].retry_policy, found["train"].retry_policy) == (TWICE, ONCE)
    assert options(pool={"train": "gpu"})["Prepare data"].pool is None


def test_a_step_that_does_not_exist_is_named_with_the_one_that_may_be_meant() -> None:
    assert "pool names the step `trian`, which does not exist: did you mean `train`?" in problems(
        pool={"trian": "gpu"}
    )
    assert "there are `Prepare data`, `train`" in problems(pool={"evaluate": "gpu"})


def test_a_partition_parameter_counts_for_the_steps_that_declare_it() -> None:
    found = options(partitions_def=DAYS, partition_parameter="rows")
    assert found["Prepare data"].partition_parameter == "rows"
    assert found["train"].partition_parameter is None


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (
            {"partitions_def": DAYS, "partition_parameter": "day"},
            "partition_parameter `day`: no step that has partitions declares a parameter of that name",
        ),
        (
            {"partitions_def": DAYS, "partition_parameter": {"train": "rows"}},
            "step `train` does not declare its partition_parameter `rows`: it has `learning-rate`",
        ),
        (
            {"partition_parameter": {"train": "learning-rate"}},
            "step `train` has a partition_parameter and no partitions",
        ),
        (
            {"partition_mappings": {"train": {"prep": dg.IdentityPartitionMapping()}}},
            "`prep` is not upstream of it, which are `Prepare data`",
        ),
        ({"checks": {"train": [check("accuracy >")]}}, "`accuracy >` cannot be read"),
        ({"checks": {"train": [check("open('x')")]}}, "there is no function open"),
        ({"checks": {"train": [check("a ** 2 > 1")]}}, "Binary operator Pow is not allowed"),
        ({"checks": {"train": [check(" ")]}}, "the expression is empty"),
        ({"checks": {"train": [check(), check()]}}, "several checks named `good`"),
        ({"checks": {"train": [check(name="good enough")]}}, "letters, digits and _ only"),
        ({"checks": {"train": [check(severity="FATAL")]}}, "'FATAL' is none of ERROR, WARN"),
    ],
)
def test_mistakes_are_told_when_the_project_is_loaded(declared: dict[str, Any], words: str) -> None:
    assert words in problems(**declared)


def test_all_mistakes_are_told_at_once() -> None:
    found = problems(
        pool={"a": "x"}, checks={"train": [check("accuracy >")]}, retry_policy={"b": ONCE}
    )
    assert len(found.splitlines()) == 3


def test_the_asset_carries_what_was_declared() -> None:
    assets = project_assets(
        project_of(TWO_STEPS),
        partitions_def={"Prepare data": DAYS},
        backfill_policy=dg.BackfillPolicy.single_run(),
        checks={"train": [check(blocking=True, description="Good enough to ship")]},
        pool="gpu",
    )
    prepare, train = assets
    assert prepare.partitions_def == DAYS
    assert train.partitions_def is None
    assert [(spec.name, spec.blocking, spec.description) for spec in train.check_specs] == [
        ("good", True, "Good enough to ship")
    ]
    assert {getattr(one.op, "pool", None) for one in assets} == {"gpu"}
    assert prepare.backfill_policy == dg.BackfillPolicy.single_run()


def test_a_partition_parameter_without_default_is_not_asked_for() -> None:
    text = TWO_STEPS.replace("type: float, default: 0.1", "type: string")
    project = project_of(text)
    asset = project_assets(project, partitions_def=DAYS, partition_parameter="learning-rate")[1]
    shape: Any = asset.op.config_schema.as_field().config_type
    field = shape.fields["parameters"].config_type.fields["learning-rate"]
    assert not field.is_required
    assert "Comes from the partition key unless given here" in field.description
