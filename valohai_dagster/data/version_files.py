"""Which datums a version holds: the same for datasets and models, each with a table of its own."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from valohai_dagster.data.datums import Datum
from valohai_dagster.records import tables as t


def read(
    connection: sa.Connection, table: sa.Table, version_id: str, *where: sa.ColumnElement[bool]
) -> list[Datum]:
    """Datums of a version by name, purged ones too."""
    query = (
        sa.select(t.datums)
        .join(table, table.c.datum_id == t.datums.c.id)
        .where(table.c.version_id == version_id, *where)
        .order_by(t.datums.c.name, t.datums.c.id)
    )
    return [Datum(**row) for row in connection.execute(query).mappings()]


def write(
    connection: sa.Connection, table: sa.Table, version_id: str, datum_ids: Sequence[str]
) -> None:
    """Each datum once."""
    rows = [{"version_id": version_id, "datum_id": i} for i in dict.fromkeys(datum_ids)]
    if rows:
        connection.execute(table.insert(), rows)
