"""The expression language of stop conditions (M-50..M-54)."""

from __future__ import annotations

import pytest

from valohai_dagster.executions.conditions import ConditionError, is_met

METADATA = {"loss": 0.5, "val-loss": 0.1, "nested.key": 3, "accuracy": "0.7", "class": 1}
PARAMETERS = {"epochs": 5, "loss": 99}


def met(expression: str) -> bool:
    return is_met(expression, metadata=METADATA, parameters=PARAMETERS)


@pytest.mark.parametrize(
    "expression",
    [
        "metadata.loss < 1",
        "metadata.val-loss == 0.1",  # M-51: a dash is part of the name
        "metadata.nested.key == 3",
        "metadata.class == 1",  # M-51: keywords are names
        "parameter.epochs >= 5",
        "epochs == 5",  # M-51: bare names
        "loss == 0.5",  # ... metadata before parameters
        "accuracy > 0.6",  # M-54: text is compared as a number
        "abs(loss - 1) == 0.5 and not false",  # M-52
        "nothing is None",  # M-53
        "not nothing",
    ],
)
def test_expressions_that_hold(expression: str):
    assert met(expression)


def test_an_expression_that_does_not_hold():
    assert not met("loss > 1")


@pytest.mark.parametrize(
    "expression", ["nothing > 1", "1 < 2 < 3", "__import__('os')", "loss >", "(" * 50, "1" * 3000]
)
def test_m53_an_expression_that_cannot_be_evaluated_is_told_apart(expression: str):
    with pytest.raises(ConditionError):
        met(expression)
