"""Checks that are declared with a step: conditions on what its execution reported, as Dagster asset checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["ERROR", "WARN"]


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
