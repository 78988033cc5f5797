"""Checks that are declared with a step: conditions on what its execution reported, as Dagster asset checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import dagster as dg

    from valohai_dagster.executions.stream import ExecutionView

Severity = Literal["ERROR", "WARN"]
SEVERITIES = ("ERROR", "WARN")
MAX_NAMES = 50  # of known metrics in a message


@dataclass(frozen=True, kw_only=True)
class MetricCheck:
    """One condition on the latest metadata and the parameters of a step's execution.

    `condition` is in the language of stop conditions: `accuracy >= 0.9 and loss < 0.5`; a bare name is looked up in
    metadata, then in parameters. A failed check of severity ERROR that is `blocking` fails the step, after its
    outputs are kept.
    """

    name: str
    condition: str
    blocking: bool = False
    severity: Severity = "ERROR"
    description: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MetricCheck:
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        return cls(**known)


def problem_of(check: MetricCheck) -> str | None:
    """What is wrong with the check itself, in words; found before anything runs."""
    from valohai_dagster.executions.conditions import ConditionError, verify

    if check.severity not in SEVERITIES:
        return f"severity {check.severity!r} is none of {', '.join(SEVERITIES)}"
    try:
        verify(check.condition)
    except ConditionError as error:
        return f"its condition `{check.condition}` cannot be read: {error}"
    return None


def check_spec(check: MetricCheck, asset: dg.AssetKey) -> dg.AssetCheckSpec:
    import dagster as dg

    return dg.AssetCheckSpec(
        check.name,
        asset=asset,
        blocking=check.blocking,
        description=check.description or f"`{check.condition}`",
        metadata={"condition": check.condition},
    )


def evaluate(check: MetricCheck, view: ExecutionView) -> dg.AssetCheckResult:
    """The check's result for a completed execution; a condition that cannot be evaluated has failed, with words."""
    import dagster as dg

    from valohai_dagster.executions.conditions import ConditionError, is_met, names_in

    known = _values(view)
    used = {name: known[name] for name in names_in(check.condition) if name in known}
    try:
        passed = is_met(check.condition, metadata=view.latest_metadata, parameters=view.parameters)
        words = ", ".join(f"{name} is {value}" for name, value in used.items()) or "no values"
    except ConditionError as error:
        passed, words = False, _unknown(check.condition, view) or str(error)
    return dg.AssetCheckResult(
        passed=passed,
        check_name=check.name,
        asset_key=None,
        severity=dg.AssetCheckSeverity(check.severity),
        description=f"`{check.condition}`: {words}",
        metadata={
            "condition": check.condition,
            **{f"value/{name}": _shown(value) for name, value in used.items()},
        },
    )


def _values(view: ExecutionView) -> dict[str, Any]:
    """By every name under which a condition finds them (M-51)."""
    return {
        **{f"parameter.{name}": value for name, value in view.parameters.items()},
        **{f"metadata.{name}": value for name, value in view.latest_metadata.items()},
        **view.parameters,
        **view.latest_metadata,
    }


def _unknown(condition: str, view: ExecutionView) -> str | None:
    """Names that nothing was reported for, and what there is instead."""
    from valohai_dagster.executions.conditions import names_in

    metrics, parameters = sorted(view.latest_metadata), sorted(view.parameters)
    known = _values(view)
    missing = [name for name in names_in(condition) if name not in known]
    if not missing:
        return None
    close = [match for name in missing for match in get_close_matches(name, known, n=1)]
    hint = f" (did you mean {', '.join(f'`{name}`' for name in close)}?)" if close else ""
    return (
        f"the execution reported no {', '.join(f'`{name}`' for name in missing)}{hint}; "
        f"it has the metrics {_listed(metrics)} and the parameters {_listed(parameters)}"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return (", ".join(names[:MAX_NAMES]) or "none") + more


def _shown(value: Any) -> Any:
    """Numbers as numbers, so that Dagster can chart them over time."""
    import dagster as dg

    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return dg.MetadataValue.text(str(value))
    return dg.MetadataValue.float(float(value)) if math.isfinite(value) else str(value)
