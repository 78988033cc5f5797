"""Uploads of the control plane itself (`data put`, logs that it saves) as the records know them before their first byte.

A row is there until its object is recorded, in the same transaction, or removed. Whoever removes marks the row first,
and a marked upload is never recorded: so an object is either known for good or goes, whenever its writer dies.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from valohai_dagster.data.datums import Datum
from valohai_dagster.errors import RefusedError
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records
from valohai_dagster.stores.base import PartedUpload

log = logging.getLogger(__name__)

LIFE = timedelta(hours=1)  # of what nobody puts off any more; then the sweep waits for its own time
PROLONG_SECONDS = 300.0  # between two times that a running upload says so

_U = t.uploads.c
Seal = Callable[
    [PartedUpload, int], bytes
]  # of an upload in parts of so many bytes, for the records


@dataclass(frozen=True, kw_only=True)
class OwnUpload:
    """One object that is being written, or removed."""

    upload_id: str
    kind: str
    name: str
    store: str
    key: str
    begun_at: datetime
    expires_at: datetime
    execution_id: str | None = None
    attempt: int | None = None
    parts: bytes | None = field(default=None, repr=False)
    given_up: bool = False


def note(conn: sa.Connection, *uploads: OwnUpload) -> None:
    """Before the first byte of any of them."""
    if uploads:
        conn.execute(t.uploads.insert(), [vars(upload) for upload in uploads])


def settle(conn: sa.Connection, keys: Collection[str]) -> set[str]:
    """Forgets these, since the caller's transaction records them; those that may not be recorded any more are left out."""
    mine = sa.and_(_U.key.in_(keys), _U.given_up.is_(False))
    return set(conn.execute(t.uploads.delete().where(mine).returning(_U.key)).scalars())


def settle_datum(conn: sa.Connection, datum: Datum) -> None:
    """The same for one; raises `RefusedError` when its upload was silent for so long that it is being removed."""
    if not settle(conn, [datum.key]):
        raise RefusedError(
            f"the upload of {datum.name!r} was not heard of for so long that it is being removed from the store "
            f"{datum.store!r}; upload it again"
        )


def prolong(conn: sa.Connection, upload_id: str, until: datetime) -> bool:
    """Its writer goes on; False when it is being removed."""
    mine = sa.and_(_U.upload_id == upload_id, _U.given_up.is_(False))
    return conn.execute(t.uploads.update().where(mine).values(expires_at=until)).rowcount == 1


def forget(conn: sa.Connection, upload_ids: Collection[str]) -> int:
    """Nothing is left of them in their stores."""
    return conn.execute(t.uploads.delete().where(_U.upload_id.in_(upload_ids))).rowcount


def overdue(
    conn: sa.Connection,
    *,
    before: datetime,
    limit: int | None = None,
    without_stores: Collection[str] = (),
) -> list[OwnUpload]:
    """Those whose writers have not been heard of since then, the oldest first."""
    query = sa.select(t.uploads).where(_U.expires_at < before, _U.store.not_in(without_stores))
    query = query.order_by(_U.expires_at, _U.upload_id).limit(limit)
    return [OwnUpload(**row) for row in conn.execute(query).mappings()]


def give_up(
    conn: sa.Connection,
    *,
    before: datetime,
    limit: int | None = None,
    without_stores: Collection[str] = (),
) -> list[OwnUpload]:
    """The same, marked: they may be removed once this is committed."""
    found = overdue(conn, before=before, limit=limit, without_stores=without_stores)
    ids = [upload.upload_id for upload in found]
    if not ids:
        return []
    # A writer may have gone on, or recorded its object, since they were looked up.
    mark = t.uploads.update().where(_U.upload_id.in_(ids), _U.expires_at < before)
    marked = set(conn.execute(mark.values(given_up=True).returning(_U.upload_id)).scalars())
    return [upload for upload in found if upload.upload_id in marked]


# -- logs that are saved for an attempt --------------------------------------------------------------------------


def log_keys(
    conn: sa.Connection,
    *,
    execution_id: str,
    attempt: int,
    prefix: str,
    streams: Collection[str],
    store: str,
    now: datetime,
) -> dict[str, str]:
    """The key of each stream, noted. A further try has those of the one before, so that few are left however many fail."""
    mine = sa.and_(
        _U.execution_id == execution_id,
        _U.attempt == attempt,
        _U.store == store,
        _U.given_up.is_(False),
    )
    prolonged = t.uploads.update().where(mine).values(expires_at=now + LIFE)
    rows = conn.execute(prolonged.returning(_U.name, _U.key))
    keys = {row.name: row.key for row in rows}
    new = [stream for stream in streams if stream not in keys]
    for stream in new:
        ident = str(uuid.uuid4())
        keys[stream] = f"{prefix}/{ident}/{stream}"
        upload = OwnUpload(
            upload_id=ident,
            kind="log",
            name=stream,
            execution_id=execution_id,
            attempt=attempt,
            store=store,
            key=keys[stream],
            begun_at=now,
            expires_at=now + LIFE,
        )
        note(conn, upload)
    return keys


# -- objects that are removed ------------------------------------------------------------------------------------


def note_removal(
    conn: sa.Connection, *, kind: str, name: str, store: str, key: str, now: datetime
) -> str:
    """The object goes once this is committed, by the caller, or by the sweep if the caller cannot; the row's id."""
    ident = str(uuid.uuid4())
    removal = OwnUpload(
        upload_id=ident,
        kind=kind,
        name=name,
        store=store,
        key=key,
        begun_at=now,
        expires_at=now,
        given_up=True,
    )
    note(conn, removal)
    return ident


def is_going(conn: sa.Connection, store: str, key: str) -> bool:
    """Whether the object is being removed."""
    mine = sa.and_(_U.store == store, _U.key == key, _U.given_up.is_(True))
    return conn.execute(sa.select(_U.upload_id).where(mine).limit(1)).first() is not None


# -- one that this process writes --------------------------------------------------------------------------------


class Noted:
    """An upload of a file by this process, noted when this is made."""

    def __init__(
        self,
        records: Records,
        *,
        upload_id: str,
        name: str,
        store: str,
        key: str,
        clock: Callable[[], datetime],
        seal: Seal,
    ) -> None:
        now = clock()
        self._upload = OwnUpload(
            upload_id=upload_id,
            kind="datum",
            name=name,
            store=store,
            key=key,
            begun_at=now,
            expires_at=now + LIFE,
        )
        self._records, self._clock, self._seal = records, clock, seal
        self._told = time.monotonic()
        with records.write() as conn:
            note(conn, self._upload)

    def begun(self, parts: PartedUpload, size: int) -> None:
        """The store calls it so."""
        self._change(parts=self._seal(parts, size))

    def goes_on(self) -> None:
        """Bytes move; cheap, and safe from several threads: the same may be written twice."""
        if time.monotonic() - self._told < PROLONG_SECONDS:
            return
        self._told = time.monotonic()
        try:
            self._change(expires_at=self._clock() + LIFE)
        except DBAPIError as error:
            text = "cannot note that the upload of %r goes on: %s"
            extra = {"action": "prolong-upload", "store": self._upload.store}
            log.warning(text, self._upload.name, error, extra=extra)

    def disown(self) -> None:
        """What lies under the key is not of this upload."""
        with self._records.write() as conn:
            forget(conn, [self._upload.upload_id])

    def _change(self, **values: Any) -> None:
        mine = _U.upload_id == self._upload.upload_id
        with self._records.write() as conn:
            conn.execute(t.uploads.update().where(mine).values(**values))
