"""What reaches the execution service: clients' submissions (stream field `s`) and agents' reports (field `r`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from valohai_agent.protocol import Report, speaks
from valohai_dagster.executions.spec_model import ExecutionSpec

log = logging.getLogger(__name__)


class Submission(BaseModel):
    """`execute`: create it, or tell its followers how it stands. `stop`: stop it, whatever its state."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    v: int = 1
    kind: Literal["execute", "stop"]
    execution_id: str
    spec: ExecutionSpec | None = None
    hard: bool = False
    reason: str = ""


def parse_submission(fields: Mapping[str, str]) -> Submission | None:
    """None for what cannot be read; its text may hold anything, so it is not logged."""
    try:
        return Submission.model_validate_json(fields["s"])
    except (ValidationError, KeyError) as error:
        log.error("dropped an unreadable submission: %s", _kinds(error), extra={"action": "drop"})
        return None


def parse_report(fields: Mapping[str, str]) -> Report | None:
    """None for what this version cannot read: a newer agent's unknown report kind, or garbage."""
    try:
        report = Report.model_validate_json(fields["r"])
    except (ValidationError, KeyError) as error:
        log.warning("dropped an unreadable report: %s", _kinds(error), extra={"action": "drop"})
        return None
    if not speaks(report.v):
        extra = {"action": "drop", "worker": report.worker}
        log.warning("dropped a report of protocol %d from %s", report.v, report.worker, extra=extra)
        return None
    return report


def _kinds(error: ValidationError | KeyError) -> str:
    """What is wrong where, without the values."""
    if isinstance(error, KeyError):
        return f"no field {error}"
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
