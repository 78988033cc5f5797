"""What to say to people who leave a project out that is needed: how it is named, and which ones there are."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from valohai_dagster.errors import NotFoundError
from valohai_dagster.records import tables as t

SHOWN = 10  # names in a message


def project_missing(
    connection: sa.Connection, reference: str, why: str, names: sa.Column[str], wanted: str
) -> NotFoundError:
    """The error to raise. `names`: a column of a table with a `project_id`; projects in which it is `wanted` come first."""
    p = t.projects.c
    all_names = connection.execute(sa.select(p.name).order_by(p.name)).scalars().all()
    query = (
        sa.select(p.name)
        .join_from(names.table, t.projects, p.id == names.table.c.project_id)
        .where(names == wanted)
        .distinct()
        .order_by(p.name)
    )
    having = connection.execute(query).scalars().all()
    known = f"known are {_few(all_names)}" if all_names else "there is none yet"
    there = f"; {wanted!r} is in {_few(having)}" if having else ""
    return NotFoundError(
        f"{reference}: {why}; name the project too, with --project NAME: {known}{there}"
    )


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
