"""Checks on what an execution reported."""

from __future__ import annotations

from typing import Any

import dagster as dg
import pytest

from tests.support.dagster_face import NOON
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.plugin.checks import MetricCheck, evaluate


def view(metadata: dict[str, Any], parameters: dict[str, Any] | None = None) -> ExecutionView:
    return ExecutionView(
        id="e1",
        counter=1,
        project="digits",
        project_id="p1",
        step="train",
        commit="a" * 40,
        image="python:3.11",
        status=ExecutionStatus.complete,
        environment="local",
        parameters=parameters or {},
        latest_metadata=metadata,
        ctime=NOON,
    )


def result(condition: str, metadata: dict[str, Any], **values: Any) -> dg.AssetCheckResult:
    parameters = values.pop("parameters", None)
    check = MetricCheck(name="good", condition=condition, **values)
    return evaluate(check, view(metadata, parameters))


def test_the_condition_and_the_values_are_shown() -> None:
    found = result("accuracy >= 0.9 and loss < 1", {"accuracy": 0.93, "loss": 0.1, "epoch": 3})
    assert found.passed
    assert found.description == "`accuracy >= 0.9 and loss < 1`: accuracy is 0.93, loss is 0.1"
    assert found.metadata["condition"].value == "accuracy >= 0.9 and loss < 1"
    assert found.metadata["value/accuracy"] == dg.MetadataValue.float(0.93)
    assert "value/epoch" not in found.metadata


def test_a_condition_that_does_not_hold_has_failed() -> None:
    found = result("accuracy >= 0.9", {"accuracy": 0.5}, severity="WARN")
    assert not found.passed
    assert found.severity == dg.AssetCheckSeverity.WARN


@pytest.mark.parametrize(
    "condition", ["val-loss < max-loss", "metadata.val-loss < parameter.max-loss"]
)
def test_m51_names_are_looked_up_in_metadata_and_in_parameters(condition: str) -> None:
    found = result(condition, {"val-loss": 0.1}, parameters={"max-loss": 0.5})
    assert found.passed
    assert len([key for key in found.metadata if key.startswith("value/")]) == 2


def test_m51_metadata_comes_before_parameters() -> None:
    assert result("rows == 2", {"rows": 2}, parameters={"rows": 1}).passed


def test_a_metric_that_was_not_reported_is_named_with_those_that_were() -> None:
    found = result("acuracy > 0.9", {"accuracy": 0.95, "loss": 1}, parameters={"rows": 5})
    assert not found.passed
    assert found.description == (
        "`acuracy > 0.9`: the execution reported no `acuracy` (did you mean `accuracy`?); "
        "it has the metrics accuracy, loss and the parameters rows"
    )


def test_an_execution_that_reported_nothing_is_told_too() -> None:
    found = result("accuracy > 0.9", {})
    assert not found.passed
    assert "it has the metrics none and the parameters none" in (found.description or "")


def test_values_that_cannot_be_compared_fail_with_words() -> None:
    found = result("accuracy > 0.9", {"accuracy": "high"})
    assert not found.passed
    assert found.metadata["value/accuracy"].value == "high"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_number_that_is_none_does_not_pass(value: float) -> None:
    assert not result("accuracy > 0.9", {"accuracy": value}).passed
