"""Stop conditions: expressions over metadata and parameters (M-40, M-50..M-54), evaluated by `leval`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leval.excs import EvaluatorError
from leval.extras.common_boolean_evaluator import CommonBooleanEvaluator

MAX_LENGTH = 2_000  # characters of an expression


class ConditionError(ValueError):
    """The expression cannot be evaluated with these values; it counts as false (M-53)."""


def is_met(expression: str, *, metadata: Mapping[str, Any], parameters: Mapping[str, Any]) -> bool:
    """Whether the expression holds. A bare name is looked up in metadata, then in parameters (M-51)."""
    if len(expression) > MAX_LENGTH:
        raise ConditionError(f"the expression is longer than {MAX_LENGTH} characters")
    values: dict[Any, Any] = {}
    for scope, names in (("parameter", parameters), ("metadata", metadata)):
        for name, value in names.items():
            path = tuple(name.split("."))
            values[(scope, *path)] = value
            values[path if len(path) > 1 else name] = value
    try:
        return bool(CommonBooleanEvaluator().evaluate(expression, values))
    except (EvaluatorError, TypeError, ValueError, ArithmeticError, SyntaxError) as error:
        raise ConditionError(str(error) or type(error).__name__) from error
