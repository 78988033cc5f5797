"""Conditions over metadata and parameters (M-40, M-50..M-54), evaluated by `leval`: stop conditions and checks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from leval.excs import EvaluatorError, NoSuchFunction
from leval.extras import common_boolean_evaluator as leval
from leval.universe.verifier import VerifierUniverse

MAX_LENGTH = 2_000  # characters of an expression
_WRONG = (EvaluatorError, TypeError, ValueError, ArithmeticError, SyntaxError)


class ConditionError(ValueError):
    """The expression cannot be evaluated with these values; it counts as false (M-53)."""


def is_met(expression: str, *, metadata: Mapping[str, Any], parameters: Mapping[str, Any]) -> bool:
    """Whether the expression holds. A bare name is looked up in metadata, then in parameters (M-51)."""
    _refuse_long(expression)
    values: dict[Any, Any] = {}
    for scope, names in (("parameter", parameters), ("metadata", metadata)):
        for name, value in names.items():
            path = tuple(name.split("."))
            values[(scope, *path)] = value
            values[path if len(path) > 1 else name] = value
    try:
        return bool(leval.CommonBooleanEvaluator().evaluate(expression, values))
    except _WRONG as error:
        raise ConditionError(_words(error)) from error


def verify(expression: str) -> None:
    """Raises ConditionError for what can never be evaluated: bad syntax, unknown functions, forbidden operations."""
    _walk(expression)


def names_in(expression: str) -> list[str]:
    """The names whose values an expression may ask for, in its order and as written; empty if it cannot be read."""
    try:
        return _walk(expression)
    except ConditionError:
        return []


class _Names(VerifierUniverse):
    """Computes nothing and notes every name."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def get_value(self, name: Any) -> Literal[True]:
        parts = (name,) if isinstance(name, str) else name
        self.seen.append(".".join(_as_written(part) for part in parts))
        return True

    def evaluate_function(self, name: str, arg_getters: Any) -> Literal[True]:
        if name not in leval.DEFAULT_FUNCTIONS:
            known = ", ".join(leval.DEFAULT_FUNCTIONS)
            raise NoSuchFunction(f"there is no function {name}; there are {known}")
        return super().evaluate_function(name, arg_getters)


def _walk(expression: str) -> list[str]:
    _refuse_long(expression)
    if not expression.strip():
        raise ConditionError("the expression is empty")
    evaluator, names = leval.CommonBooleanEvaluator, _Names()
    try:
        evaluator.evaluator_class(names, max_depth=evaluator.max_depth).evaluate_expression(
            expression
        )
    except _WRONG as error:
        raise ConditionError(_words(error)) from error
    return list(dict.fromkeys(names.seen))


def _as_written(part: str) -> str:
    """`leval` rewrites dashes and Python's keywords in names."""
    words = (word.removeprefix(leval.KEYWORD_PREFIX) for word in part.split(leval.DASH_SEP))
    return "-".join(words)


def _words(error: BaseException) -> str:
    text = re.sub(r"<ast\.(\w+) object at \w+>", r"\1", str(error))
    return text.replace(" (<expression>, line 1)", "") or type(error).__name__


def _refuse_long(expression: str) -> None:
    if len(expression) > MAX_LENGTH:
        raise ConditionError(f"the expression is longer than {MAX_LENGTH} characters")
