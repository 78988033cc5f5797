"""Warnings that come up while an execution runs: kept with it, and told once; and its versions at its end."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import sqlalchemy as sa

from valohai_dagster.data.version_effects import (
    Settled,
    executions_with_versions,
    settle_versions,
)
from valohai_dagster.executions.memory import Active
from valohai_dagster.executions.writing import Writing
from valohai_dagster.records import tables as t

MAX_KEPT = 100  # of one execution; what comes after them is not told either
_LAST = f"more than {MAX_KEPT} warnings; further ones are left out"


def keep_warnings(writing: Writing, active: Active, texts: Sequence[str]) -> list[str]:
    """Adds them to the execution's warnings; those that it did not have yet, which are to be told."""
    if not texts:
        return []
    c = t.executions.c
    writing.touch(active)
    writing.flush()
    known = writing.conn.execute(sa.select(c.warnings).where(c.id == active.id)).scalar_one() or []
    new = [text for text in dict.fromkeys(texts) if text not in known]
    room = MAX_KEPT - len(known)
    if len(new) > room:
        new = [*new[:room], _LAST] if room > 0 else []
    if new:
        writing.update(active, warnings=[*known, *new])
    return new


def settle_versions_of(writing: Writing, execution_ids: Collection[str]) -> dict[str, Settled]:
    """Closes the versions of executions that have ended; what is new of each."""
    told: dict[str, Settled] = {}
    for execution_id in executions_with_versions(writing.conn, execution_ids):
        active = writing.find(execution_id)
        if active is None or not writing.is_mine(active.shard):
            continue
        settled = settle_versions(writing.touch(active, t.datums), execution_id, writing.now)
        settled.warnings = keep_warnings(writing, active, settled.warnings)
        told[execution_id] = settled
    return told
