"""What agents tell about inputs that are in place, written down for many files at once (I-32)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cache

import sqlalchemy as sa

from valohai_agent.protocol import InputReady
from valohai_dagster.data.datums import learn_checksums
from valohai_dagster.data.outside import Found, note_contents
from valohai_dagster.records import tables as t


def record_inputs(
    conn: sa.Connection, execution_id: str, files: Sequence[InputReady], now: datetime
) -> list[str]:
    """Checksums and versions of each use; gives warnings about outside content that has changed."""
    c = t.execution_inputs.c
    mine = sa.and_(c.execution_id == execution_id, c.file_id.in_([file.file_id for file in files]))
    query = sa.select(c.file_id, c.uri, c.datum_id, c.sha256).where(mine)
    known = {row.file_id: row for row in conn.execute(query)}
    for versioned in (False, True):
        rows = [_row(execution_id, file) for file in files if bool(file.version) is versioned]
        if rows:
            conn.execute(_update(versioned), rows)
    outside: list[Found] = []
    for file in files:
        row = known.get(file.file_id)
        if row is None:
            continue
        if row.datum_id is None:
            outside.append(Found(uri=row.uri, checksums=file.checksums, size=file.size))
        elif row.sha256 is None:
            learn_checksums(conn, row.datum_id, file.checksums)
    return note_contents(conn, outside, execution_id=execution_id, now=now)


def _row(execution_id: str, file: InputReady) -> dict[str, object]:
    return {
        "k_execution": execution_id,
        "k_file": file.file_id,
        "v_name": file.name,
        "v_size": file.size,
        "v_cached": file.cached,
        "v_md5": file.checksums.md5,
        "v_sha1": file.checksums.sha1,
        "v_sha256": file.checksums.sha256,
        "v_version": file.version and file.version[:255],
    }


@cache
def _update(versioned: bool) -> sa.Update:
    c = t.execution_inputs.c
    names = ["name", "size", "cached", "md5", "sha1", "sha256", *(["version"] * versioned)]
    mine = sa.and_(
        c.execution_id == sa.bindparam("k_execution"), c.file_id == sa.bindparam("k_file")
    )
    values = {name: sa.bindparam(f"v_{name}") for name in names}
    return t.execution_inputs.update().where(mine).values(values)
