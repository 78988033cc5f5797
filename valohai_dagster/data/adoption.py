"""Existing objects of a store become datums where they are, without being copied (I-40).

What this product has put into a store itself is no object of somebody else's: it may be in flight, and retention or
the sweeping of uploads removes it. It is left out, and told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import BinaryIO, cast

import sqlalchemy as sa

from valohai_agent.protocol import Checksums
from valohai_dagster.data.datums import CHUNK, VERSION_CHARS, Datum, new_id
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.placement import place
from valohai_dagster.data.survey import Pattern, look, no_store, pattern_of
from valohai_dagster.data.transfers import CHUNK_BYTES, HashingReader, Progress
from valohai_dagster.errors import RefusedError, StoreError
from valohai_dagster.records.engine import Records
from valohai_dagster.records.tables import commits, datums
from valohai_dagster.stores.base import ObjectStat, Store
from valohai_dagster.stores.keys import check_key
from valohai_dagster.stores.registry import Stores

NOT_FOUND = "adoptable_file_not_found"
OURS = "adoptable_file_is_ours"

_ID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_OUR_KEYS = (
    re.compile(  # of granted uploads, of logs that are saved, of packages, of archives of commits
        rf"(data|logs|packages)/([^/]+/)?{_ID}/.+|commits/[^/]+/[0-9a-f]{{64}}(-\d+)?\.tar\.gz"
    )
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An object that is to become a datum."""

    url: str  # as it was asked for, maybe with a wildcard
    store: Store
    stat: ObjectStat
    name: str

    @property
    def uri(self) -> str:
        return self.store.uri(self.stat.key)


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A URL that cannot be adopted; `code` is for programs."""

    url: str
    message: str
    code: str | None = None


@dataclass(kw_only=True)
class Adoption:
    """By URI of each object: the datum that it became, or was already. `refused`: what is not there to be adopted."""

    created: dict[str, Datum] = field(default_factory=dict)
    existing: dict[str, Datum] = field(default_factory=dict)
    refused: list[Missing] = field(default_factory=list)


def find_candidates(urls: Sequence[str], stores: Stores) -> tuple[list[Candidate], list[Missing]]:
    """Asks the stores; wildcards as in inputs (I-03), names are those below the wildcard's directory."""
    found: dict[str, Candidate] = {}
    missing: list[Missing] = []
    for url in urls:
        try:
            objects = list(_candidates(url, stores))
        except (RefusedError, StoreError, ValueError) as error:
            missing.append(Missing(url=url, message=f"{url}: {error}"))
            continue
        if not objects:
            text = f"{url}: there is no such file in the store"
            missing.append(Missing(url=url, message=text, code=NOT_FOUND))
        found.update((candidate.uri, candidate) for candidate in objects)
    return list(found.values()), missing


def _candidates(url: str, stores: Stores) -> list[Candidate]:
    served = pattern_of(url, stores, InputSpec(name="adopted", keep_directories="suffix"))
    if served is None:
        raise RefusedError(no_store(url, stores))
    store, pattern = served
    wildcard = pattern.wildcard
    objects = look(store, pattern) if wildcard else _one(store, pattern)
    root = wildcard.root if wildcard else ""
    found: list[Candidate] = []
    for stat in objects:
        name = check_key(place(stat.key, keep="suffix", root=root))
        # Of stores that lie in each other the deepest one has written it.
        deep, key = stores.serving(store.uri(stat.key)) or (store, stat.key)
        found.append(Candidate(url=url, store=deep, stat=replace(stat, key=key), name=name))
    return found


def _one(store: Store, pattern: Pattern) -> list[ObjectStat]:
    found = store.stat(check_key(pattern.key, store=store.name))
    return [found] if found else []


def adopt(
    records: Records,
    candidates: Sequence[Candidate],
    *,
    project_id: str | None,
    tags: Sequence[str] = (),
    checksums_of: Callable[[Candidate], Checksums] | None = None,
    now: datetime,
) -> Adoption:
    """Records them; what is a datum already is left as it is. `checksums_of` reads an object through."""
    adoption = Adoption()
    ours: list[Candidate] = []
    for start in range(0, len(candidates), CHUNK):
        part = candidates[start : start + CHUNK]
        with records.read() as connection:
            known = _known(connection, part)
            refused = _ours(connection, [c for c in part if c.uri not in known])
        ours += [c for c in part if c.uri in refused]
        part = [c for c in part if c.uri not in refused]
        sums = {c.uri: checksums_of(c) for c in part if checksums_of and c.uri not in known}
        with records.write() as connection:
            known = _known(connection, part)
            made = [
                _datum(c, sums.get(c.uri), project_id, tags, now)
                for c in part
                if c.uri not in known
            ]
            if made:
                rows = [
                    {column.name: getattr(datum, column.name) for column in datums.columns}
                    for datum in made
                ]
                connection.execute(datums.insert(), rows)
        adoption.existing.update(known)
        uris = [c.uri for c in part if c.uri not in known]
        adoption.created.update(zip(uris, made, strict=True))
    adoption.refused = _refusals(ours)
    return adoption


def _ours(connection: sa.Connection, part: Sequence[Candidate]) -> set[str]:
    """URIs of what this product keeps in the stores that it writes to."""
    written = [c for c in part if not c.store.readonly]
    c = commits.c
    keys = [candidate.stat.key for candidate in written]
    query = sa.select(c.archive_store, c.archive_key).where(c.archive_key.in_(keys))
    archives = {(store, key) for store, key in connection.execute(query)}
    return {
        candidate.uri
        for candidate in written
        if _OUR_KEYS.fullmatch(candidate.stat.key)
        or (candidate.store.name, candidate.stat.key) in archives
    }


def _refusals(ours: Sequence[Candidate]) -> list[Missing]:
    """One for each URL that was asked for."""
    by_url: dict[str, list[Candidate]] = {}
    for candidate in ours:
        by_url.setdefault(candidate.url, []).append(candidate)
    return [
        Missing(
            url=url,
            message=f"{url}: {len(found)} of the objects are files of this product (outputs, logs, archives of "
            f"commits, uploads that go on), such as {found[0].stat.key}; they were left out. What another deployment "
            "has left there can be adopted through a store with readonly = true",
            code=OURS,
        )
        for url, found in by_url.items()
    ]


def read_checksums(candidate: Candidate, progress: Progress | None = None) -> Checksums:
    """Reads the whole object, in constant memory; raises `StoreError` when it changes meanwhile."""
    with candidate.store.open(candidate.stat.key) as source:
        reader = HashingReader(cast("BinaryIO", source), progress)
        while reader.read(CHUNK_BYTES):
            pass
    if reader.size != candidate.stat.size:
        raise StoreError(
            f"{candidate.uri} has {reader.size} bytes, was listed with {candidate.stat.size}: it changes right now; "
            "adopt it when it is finished",
            store=candidate.store.name,
        )
    return reader.checksums()


def _known(connection: sa.Connection, part: Sequence[Candidate]) -> dict[str, Datum]:
    """Datums with content at these places, the oldest of each, by URI; not those of what was there before."""
    uris = {(c.store.name, c.stat.key): c.uri for c in part}
    versions = {c.uri: c.stat.version[:VERSION_CHARS] for c in part}
    c = datums.c
    query = (
        sa.select(datums)
        .where(c.key.in_([key for _, key in uris]), c.purged.is_(False))
        .order_by(c.ctime.desc())
    )
    known: dict[str, Datum] = {}
    for row in connection.execute(query).mappings():
        uri = uris.get((row["store"], row["key"]))
        if uri is not None and row["version"] in (None, versions[uri]):
            known[uri] = Datum(**row)
    return known


def _datum(
    candidate: Candidate,
    checksums: Checksums | None,
    project_id: str | None,
    tags: Sequence[str],
    now: datetime,
) -> Datum:
    stat = candidate.stat
    return Datum(
        id=new_id(),
        name=candidate.name,
        size=stat.size,
        store=candidate.store.name,
        key=stat.key,
        project_id=project_id,
        ctime=now,
        tags=list(dict.fromkeys(tags)),
        adopted=True,
        version=stat.version[:VERSION_CHARS] or None,
        file_mtime=stat.mtime,
        **(checksums or Checksums()).model_dump(),
    )
