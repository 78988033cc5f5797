"""What clients ask of the execution service, one entry of the submissions stream each (field `s`)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from valohai_dagster.executions.spec_model import ExecutionSpec


class Submission(BaseModel):
    """`execute`: create it, or tell its followers how it stands. `stop`: stop it, whatever its state."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    v: int = 1
    kind: Literal["execute", "stop"]
    execution_id: str
    spec: ExecutionSpec | None = None
    hard: bool = False
    reason: str = ""
