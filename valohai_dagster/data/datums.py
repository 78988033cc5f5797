"""Datums: immutable tracked files (T-14). Statements over a connection; the caller owns the transaction."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from valohai_agent.protocol import Checksums
from valohai_dagster.data import aliases
from valohai_dagster.data.projects_known import project_missing
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.records.tables import datum_aliases, datums
from valohai_dagster.stores.registry import Stores

SCHEME = "datum://"
CHUNK = 500  # rows of one statement with a list of ids
VERSION_CHARS = 255  # of a version, that the records keep


@dataclass(frozen=True, kw_only=True)
class Datum:
    """One row of the records, typed."""

    id: str
    name: str
    size: int
    store: str
    key: str
    ctime: datetime
    md5: str | None = None
    sha1: str | None = None
    sha256: str | None = None
    project_id: str | None = None
    execution_id: str | None = None
    withdrawn: bool = False
    tags: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)
    adopted: bool = False
    version: str | None = None  # as the store called the content when it was adopted
    live: bool = False
    file_ctime: datetime | None = None
    file_mtime: datetime | None = None
    purged: bool = False
    purged_at: datetime | None = None

    @property
    def uri(self) -> str:
        return SCHEME + self.id

    @property
    def checksums(self) -> Checksums:
        return Checksums(md5=self.md5, sha1=self.sha1, sha256=self.sha256)

    @property
    def trusted_version(self) -> str | None:
        """The version that alone tells the content; None when a sha256 does, or nothing."""
        return None if self.sha256 else self.version


def create_datum(connection: sa.Connection, datum: Datum) -> None:
    values = {column.name: getattr(datum, column.name) for column in datums.columns}
    connection.execute(datums.insert().values(**values))


def find_datum(connection: sa.Connection, datum_id: str) -> Datum | None:
    query = sa.select(datums).where(datums.c.id == datum_id.lower())
    row = connection.execute(query).mappings().one_or_none()
    return Datum(**row) if row else None


def find_datums(connection: sa.Connection, datum_ids: Iterable[str]) -> dict[str, Datum]:
    """Those that there are, by id."""
    ids = sorted({datum_id.lower() for datum_id in datum_ids})
    found: dict[str, Datum] = {}
    for start in range(0, len(ids), CHUNK):
        query = sa.select(datums).where(datums.c.id.in_(ids[start : start + CHUNK]))
        found |= {row["id"]: Datum(**row) for row in connection.execute(query).mappings()}
    return found


def get_datum(connection: sa.Connection, reference: str, *, project_id: str | None) -> Datum:
    """The datum of `datum://<id or alias>` or of the bare id or alias; the content may be purged.

    Raises `NotFoundError` naming what is unknown. Aliases are looked up in the project only (I-07).
    """
    name = reference.removeprefix(SCHEME)
    if aliases.is_datum_id(name):
        datum = find_datum(connection, name)
        if datum is None:
            raise NotFoundError(
                f"{SCHEME}{name}: there is no datum with this id; `valohai-dagster data ls` lists them"
            )
        return datum
    if project_id is None:
        why = "not a datum id, and an alias belongs to a project"
        raise project_missing(connection, SCHEME + name, why, datum_aliases.c.name, name)
    target = aliases.find_alias(connection, project_id, name)
    datum = find_datum(connection, target) if target else None
    if datum is None:
        raise NotFoundError(
            f"{SCHEME}{name}: this project has no datum alias {name!r}; an output gets one by `valohai.alias` "
            "in its metadata, an upload by `valohai-dagster data put --alias`; `valohai-dagster data ls` shows ids"
        )
    return datum


def list_datums(
    connection: sa.Connection,
    *,
    project_id: str | None = None,
    execution_ids: Collection[str] | None = None,
    name: str | None = None,
    tags: Iterable[str] = (),
    among: Collection[str] | None = None,
    purged: bool = False,
    limit: int | None = 100,
) -> list[Datum]:
    """Newest first. `name` may hold `*`; every tag of `tags` must be there (I-41). `among`: only these ids.

    Of executions only the outputs that count, not what a lost attempt has stored.
    """
    query = sa.select(datums).order_by(datums.c.ctime.desc(), datums.c.id)
    if not purged:
        query = query.where(datums.c.purged.is_(False))
    if project_id is not None:
        query = query.where(datums.c.project_id == project_id)
    if execution_ids is not None:
        outputs = sa.and_(datums.c.execution_id.in_(execution_ids), datums.c.withdrawn.is_(False))
        query = query.where(outputs)
    if name is not None:
        query = query.where(datums.c.name.like(_like(name), escape="\\"))
    wanted = set(tags)
    found: list[Datum] = []
    for row in connection.execute(query).mappings():
        if wanted <= set(row["tags"]) and (among is None or row["id"] in among):
            found.append(Datum(**row))
        if limit is not None and len(found) >= limit:
            break
    return found


def aliases_of(connection: sa.Connection, datum_ids: Sequence[str]) -> dict[str, list[str]]:
    """Names that point to each of the datums now."""
    c = datum_aliases.c
    query = sa.select(c.datum_id, c.name).where(c.datum_id.in_(datum_ids)).order_by(c.name)
    found: dict[str, list[str]] = {}
    for datum_id, name in connection.execute(query):
        found.setdefault(datum_id, []).append(name)
    return found


def learn_checksums(connection: sa.Connection, datum_id: str, checksums: Checksums) -> None:
    """What a worker has found in a datum that was adopted without being read."""
    unknown = sa.and_(datums.c.id == datum_id, datums.c.sha256.is_(None))
    connection.execute(datums.update().where(unknown).values(**checksums.model_dump()))


def add_tags(connection: sa.Connection, datum_id: str, tags: Sequence[str]) -> None:
    """Appends tags that are not there yet."""
    c = datums.c
    have = connection.execute(sa.select(c.tags).where(c.id == datum_id)).scalar_one()
    connection.execute(
        datums.update().where(c.id == datum_id).values(tags=list(dict.fromkeys([*have, *tags])))
    )


def remove_tags(connection: sa.Connection, datum_id: str, tags: Sequence[str]) -> None:
    have = connection.execute(sa.select(datums.c.tags).where(datums.c.id == datum_id)).scalar_one()
    kept = [tag for tag in have if tag not in tags]
    connection.execute(datums.update().where(datums.c.id == datum_id).values(tags=kept))


def mark_purged(connection: sa.Connection, datum_ids: Sequence[str]) -> None:
    """The records keep the datums, without content (O-20). Then `delete_content`, and `end_purge` when that is done: a
    crash in between leaves content that nobody reads and that the next retention run deletes, never a record that lies.
    """
    _purge(connection, datum_ids, datums.c.purged.is_(False), purged=True, purged_at=None)


def end_purge(connection: sa.Connection, datum_ids: Sequence[str], now: datetime) -> None:
    """Their content is gone, or was left to whom it belongs."""
    _purge(connection, datum_ids, datums.c.purged.is_(True), purged_at=now)


def _purge(
    connection: sa.Connection,
    datum_ids: Sequence[str],
    where: sa.ColumnElement[bool],
    **values: Any,
) -> None:
    for start in range(0, len(datum_ids), CHUNK):
        these = datums.c.id.in_(datum_ids[start : start + CHUNK])
        connection.execute(datums.update().where(sa.and_(these, where)).values(**values))


def hold(connection: sa.Connection, datum_ids: Collection[str]) -> None:
    """Keeps the content of these datums until the transaction ends, which must be one that writes.

    For whoever is going to name them: retention and `data rm` lock a datum before they look who needs it. Raises
    `RefusedError` when a content is purged already.
    """
    ids = sorted(set(datum_ids))
    columns = (datums.c.id, datums.c.name, datums.c.purged)
    for start in range(0, len(ids), CHUNK):
        these = datums.c.id.in_(ids[start : start + CHUNK])
        query = sa.select(*columns).where(these).order_by(datums.c.id)
        for row in connection.execute(query.with_for_update(read=True, key_share=True)):
            _require(row)


def lock(connection: sa.Connection, datum_ids: Sequence[str], *, skip: bool = False) -> list[Any]:
    """Rows of the datums, which nobody can begin to need until the transaction ends.

    `skip`: without those that somebody is just about to need, else it waits for them.
    """
    query = sa.select(datums).where(datums.c.id.in_(datum_ids)).order_by(datums.c.id)
    return list(connection.execute(query.with_for_update(skip_locked=skip)))


def is_shared(connection: sa.Connection, datum: Datum) -> bool:
    """Whether another datum that is not purged has the same content in the same place."""
    c = datums.c
    same = sa.and_(c.store == datum.store, c.key == datum.key, c.id != datum.id)
    return (
        connection.execute(sa.select(c.id).where(same, c.purged.is_(False)).limit(1)).first()
        is not None
    )


def delete_content(stores: Stores, datum: Datum, *, adopted_too: bool = False) -> bool:
    """Deletes what the store has, outside of any transaction; whether it did.

    What was adopted belongs to somebody else and stays, unless that is asked for.
    """
    if datum.adopted and not adopted_too:
        return False
    stores.get(datum.store).delete(datum.key)
    return True


def replaced(datum: Datum, what: str) -> RefusedError:
    """The refusal of an adopted object that is another one now; `what`: how that was seen. A datum never changes."""
    return RefusedError(
        f"{datum.uri} ({datum.name}): the object {datum.key} of the store {datum.store!r} was replaced since it was "
        f"adopted: {what}. Put the old content back, or make a datum of what is there now: `valohai-dagster data "
        "adopt` with its URL"
    )


def require_content(datum: Datum) -> Datum:
    """The datum, or a refusal when its content was purged (I-38)."""
    _require(datum)
    return datum


def _require(datum: Any) -> None:
    if datum.purged:
        raise RefusedError(
            f"{SCHEME}{datum.id} ({datum.name}): the content was purged; choose another datum, or run again what made it"
        )


def new_id() -> str:
    return str(uuid.uuid4())


def _like(pattern: str) -> str:
    for special in ("\\", "%", "_"):
        pattern = pattern.replace(special, "\\" + special)
    return pattern.replace("*", "%")
