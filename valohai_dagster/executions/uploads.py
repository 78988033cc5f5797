"""Granted uploads in the records: which are unfinished, and which of them nobody can finish any more.

Plain functions over a connection; the caller owns the transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from valohai_dagster.data.own_uploads import OwnUpload
from valohai_dagster.executions.memory import Active
from valohai_dagster.executions.stream import ExecutionStatus as Status
from valohai_dagster.records import tables as t

_G, _E = t.grants.c, t.executions.c
_FINAL = [status.value for status in Status if status.final]
_OPEN = sa.and_(sa.not_(_G.accepted), _G.swept_at.is_(None))  # as the index has it


def unfinished(conn: sa.Connection, active: Active, upload_id: str) -> Any:
    """The upload (store, key, parts) if this very attempt was granted it and has not finished it; else None."""
    mine = sa.and_(_G.execution_id == active.id, _G.attempt == active.attempt)
    query = sa.select(_G.store, _G.key, _G.parts).where(_G.upload_id == upload_id, mine, _OPEN)
    return conn.execute(query).one_or_none()


def prolong(conn: sa.Connection, upload_id: str, until: datetime) -> None:
    """Fresh URLs are signed for it, which run out then."""
    conn.execute(t.grants.update().where(_G.upload_id == upload_id).values(expires_at=until))


def keep_parts(conn: sa.Connection, parts: dict[str, bytes]) -> None:
    """What stores call the uploads in parts that they have begun, encrypted, by upload id."""
    for upload_id, sealed in parts.items():
        conn.execute(t.grants.update().where(_G.upload_id == upload_id).values(parts=sealed))


# -- what is left over -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """An upload that nobody can finish any more; something of it may lie in its store."""

    upload_id: str
    execution_id: str | None  # none of what people upload themselves
    attempt: int | None
    kind: str
    name: str
    store: str
    key: str
    expires_at: datetime
    parts: bytes | None = field(repr=False)


def leftover_of(upload: OwnUpload) -> Leftover:
    """One of the control plane itself that has been given up."""
    return Leftover(**{name: getattr(upload, name) for name in Leftover.__dataclass_fields__})


Mark = tuple[datetime, str]  # the last one of the previous look, in the order of `leftovers`


def leftovers(
    conn: sa.Connection,
    *,
    before: datetime,
    limit: int,
    shards: Collection[int] | None = None,
    without_stores: Collection[str] = (),
    after: Mark | None = None,
) -> list[Leftover]:
    """Uploads without an accepted report whose attempt is over and whose URLs ran out before that moment.

    An attempt that is over stays over, and reports of it are refused from then on: what is found here can never
    become a datum or a log. Ordered by the end of their URLs.
    """
    over = sa.or_(_E.status.in_(_FINAL), _G.attempt < _E.attempt)
    query = (
        sa.select(*(getattr(_G, name) for name in Leftover.__dataclass_fields__))
        .join(t.executions, _E.id == _G.execution_id)
        .where(_OPEN, _G.expires_at < before, over)
        .order_by(_G.expires_at, _G.upload_id)
        .limit(limit)
    )
    if shards is not None:
        query = query.where(_E.shard.in_(shards))
    if without_stores:
        query = query.where(_G.store.not_in(without_stores))
    if after is not None:
        end, upload_id = after
        beyond = sa.and_(_G.expires_at == end, _G.upload_id > upload_id)
        query = query.where(sa.or_(_G.expires_at > end, beyond))
    return [Leftover(**row) for row in conn.execute(query).mappings()]


def mark_swept(conn: sa.Connection, upload_ids: Sequence[str], now: datetime) -> int:
    """Nothing is left of them in their stores; how many of them were not swept before."""
    swept = t.grants.update().where(_G.upload_id.in_(upload_ids), _OPEN).values(swept_at=now)
    return conn.execute(swept).rowcount
