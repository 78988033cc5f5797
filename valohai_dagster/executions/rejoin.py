"""Finding the execution that a dead client of the same step has left behind.

A client (an op process, a run driver) may die while its execution goes on. Who tries the step again must join that
execution instead of starting a second one beside it, provided that it asks for the very same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from valohai_dagster.executions.credentials import shown_inputs
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.executions.stream import ExecutionStatus as Status
from valohai_dagster.records import tables as t

# What tells one try of a step from another, and nothing about the work itself.
_OF_THE_TRY = {
    "execution_id",
    "run_id",
    "retry_number",
    "log_key",
    "creator",
    "teams",
    "organization",
    "client",
    "warnings",
    "sealed_uris",
}


def execution_to_rejoin(
    conn: sa.Connection, spec: ExecutionSpec, parent_run_ids: Sequence[str] = ()
) -> str | None:
    """The newest execution of the same work for the same step of this run or of the run that it retries.

    It must be unfinished; in the same run it may also be complete, since a step whose result had arrived would not
    be tried again. Failed and stopped ones are not joined: trying again is meant to run again.
    """
    c = t.executions.c
    query = (
        sa.select(c.id, c.run_id, c.status, c.spec)
        .where(
            c.run_id.in_([spec.run_id or "", *parent_run_ids]),
            c.step_key == spec.step_key,
            c.instance_id == spec.instance_id,
            c.id != spec.execution_id,
        )
        .order_by(c.ctime.desc())
        .limit(1)
    )
    row = conn.execute(query).one_or_none()
    shown = spec.model_copy(update={"inputs": shown_inputs(spec)})
    if row is None or _work(row.spec) != _work(shown.model_dump(mode="json")):
        return None
    status = Status(row.status)
    complete_here = status is Status.complete and row.run_id == spec.run_id
    return row.id if not status.final or complete_here else None


def _work(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key not in _OF_THE_TRY}
