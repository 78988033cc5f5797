"""Packages of dataset versions in the records (O-23): which versions are to be packed, who is at it, what is stored.

A version is `wanted` until all its packages are stored (`made`), until that turns out to be impossible (`failed`), or
until its packages may not be used any more (`dropped`). Whatever the state is, its files are still there one by one.
Statements over a connection; the caller owns the transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from valohai_dagster.data import own_uploads, version_files
from valohai_dagster.data.datums import Datum
from valohai_dagster.records import tables as t
from valohai_dagster.records.store import insert_ignore

WANTED, MADE, FAILED, DROPPED = "wanted", "made", "failed", "dropped"
KIND = "package"  # of its upload
CLAIM = timedelta(seconds=60)  # after so long without a word somebody else goes on
CHUNK = 500  # rows of one statement with a list of ids

FEW_FILES = 1_000  # with fewer there is little to gain
LARGE_BYTES = 10_000_000  # neither for files above

_G, _P, _F = t.packagings.c, t.packages.c, t.dataset_files.c


@dataclass(frozen=True, kw_only=True)
class Package:
    """A stored package, an uncompressed tar."""

    id: str
    version_id: str
    number: int
    store: str
    key: str
    size: int
    files: int
    sha256: str
    ctime: datetime


@dataclass(frozen=True, kw_only=True)
class Packaging:
    """How the packing of one version stands. `problem`: why it is not made, for people."""

    version_id: str
    state: str
    due: datetime
    ctime: datetime
    tries: int = 0
    holder: str | None = None
    problem: str | None = None


# -- looking up --------------------------------------------------------------------------------------------------


def packaging_of(connection: sa.Connection, version_id: str) -> Packaging | None:
    """None for a version that nobody wants packed."""
    return packagings_of(connection, [version_id]).get(version_id)


def packagings_of(connection: sa.Connection, version_ids: Collection[str]) -> dict[str, Packaging]:
    """By version."""
    query = sa.select(t.packagings).where(_G.version_id.in_(version_ids))
    return {row["version_id"]: Packaging(**row) for row in connection.execute(query).mappings()}


def packages_of(connection: sa.Connection, version_id: str) -> list[Package]:
    """The stored ones in order."""
    query = sa.select(t.packages).where(_P.version_id == version_id).order_by(_P.number)
    return [Package(**row) for row in connection.execute(query).mappings()]


def sums_of(
    connection: sa.Connection, version_ids: Collection[str]
) -> dict[str, tuple[int, int, int]]:
    """Number of packages, their bytes and their files, by version."""
    sums = (sa.func.count(), sa.func.sum(_P.size), sa.func.sum(_P.files))
    query = sa.select(_P.version_id, *sums).where(_P.version_id.in_(version_ids))
    rows = connection.execute(query.group_by(_P.version_id))
    return {row[0]: (int(row[1]), int(row[2]), int(row[3])) for row in rows}


def members_of(connection: sa.Connection, version_id: str) -> dict[str, str]:
    """Ids of packages by datum, of all that are in one."""
    query = sa.select(_F.datum_id, _F.package_id).where(
        _F.version_id == version_id, _F.package_id.is_not(None)
    )
    return {row.datum_id: row.package_id for row in connection.execute(query)}


def usable(connection: sa.Connection, package_ids: Collection[str]) -> set[str]:
    """Those that are stored and hold no content that was purged meanwhile."""
    purged = (
        sa.select(_F.datum_id)
        .join(t.datums, t.datums.c.id == _F.datum_id)
        .where(_F.package_id == _P.id, _F.version_id == _P.version_id, t.datums.c.purged)
    )
    query = sa.select(_P.id).where(_P.id.in_(package_ids), ~purged.exists())
    return set(connection.execute(query).scalars())


def left_to_pack(connection: sa.Connection, version_id: str) -> list[Datum]:
    """Files of the version that are in no package yet, by name."""
    return version_files.read(connection, t.dataset_files, version_id, _F.package_id.is_(None))


def advice(sizes: Sequence[int]) -> str | None:
    """When packages are of little use for files of these sizes, in words (O-23)."""
    large = sum(size > LARGE_BYTES for size in sizes)
    words = []
    if len(sizes) < FEW_FILES:
        words.append(
            f"it has {len(sizes):,} file{'s' * (len(sizes) != 1)}, and packages are worth it from {FEW_FILES:,} on"
        )
    if large:
        words.append(f"{large} of its files are above 10 MB, for which a package is no quicker")
    return "; ".join(words) or None


# -- wanting -----------------------------------------------------------------------------------------------------


def want(connection: sa.Connection, version_id: str, now: datetime) -> None:
    """The version is to be packed, also once more when that has failed; nothing changes when it is packed already."""
    values = {"version_id": version_id, "state": WANTED, "due": now, "tries": 0, "ctime": now}
    if insert_ignore(connection, t.packagings, **values):
        return
    over = sa.and_(_G.version_id == version_id, _G.state.in_((FAILED, DROPPED)))
    fresh = {"state": WANTED, "due": now, "tries": 0, "problem": None, "holder": None}
    connection.execute(t.packagings.update().where(over).values(**fresh))


def drop(connection: sa.Connection, version_id: str, why: str, now: datetime) -> list[str]:
    """Nobody gets these packages any more; they are removed as `own_uploads` has it. The ids of the removals."""
    gone = {"state": DROPPED, "problem": why, "holder": None}
    connection.execute(t.packagings.update().where(_G.version_id == version_id).values(**gone))
    mine = _F.version_id == version_id
    connection.execute(t.dataset_files.update().where(mine).values(package_id=None))
    removals = [
        own_uploads.note_removal(
            connection, kind=KIND, name=one.id, store=one.store, key=one.key, now=now
        )
        for one in packages_of(connection, version_id)
    ]
    connection.execute(t.packages.delete().where(_P.version_id == version_id))
    return removals


def drop_holding(connection: sa.Connection, datum_ids: Sequence[str], now: datetime) -> list[str]:
    """Drops the packages of every version that holds one of these files, whose content is purged."""
    versions: dict[str, str] = {}
    for start in range(0, len(datum_ids), CHUNK):
        query = (
            sa.select(_F.version_id, _F.datum_id)
            .join(t.packagings, _G.version_id == _F.version_id)
            .where(_F.datum_id.in_(datum_ids[start : start + CHUNK]), _G.state != DROPPED)
        )
        versions.update((row.version_id, row.datum_id) for row in connection.execute(query))
    return [
        removal
        for version_id, datum_id in versions.items()
        for removal in drop(connection, version_id, f"datum://{datum_id} was purged", now)
    ]


# -- packing -----------------------------------------------------------------------------------------------------


def next_wanted(connection: sa.Connection, now: datetime) -> str | None:
    """The version that waits longest and that nobody is at."""
    query = sa.select(_G.version_id).where(_G.state == WANTED, _G.due <= now)
    return connection.execute(query.order_by(_G.due, _G.version_id).limit(1)).scalar()


def claim(connection: sa.Connection, version_id: str, holder: str, now: datetime) -> bool:
    """Whether the version is now this holder's to pack, for as long as `CLAIM`."""
    free = sa.and_(_G.version_id == version_id, _G.state == WANTED, _G.due <= now)
    taken = {"holder": holder, "due": now + CLAIM}
    return connection.execute(t.packagings.update().where(free).values(**taken)).rowcount == 1


def keep(connection: sa.Connection, version_id: str, holder: str, now: datetime) -> bool:
    """Renews the claim; False when it is another's by now, or when nobody wants the packages any more."""
    return _change(connection, version_id, holder, due=now + CLAIM)


def put_off(
    connection: sa.Connection, version_id: str, holder: str, *, problem: str, due: datetime
) -> None:
    """Another try then."""
    _change(
        connection, version_id, holder, problem=problem, due=due, tries=_G.tries + 1, holder=None
    )


def end(
    connection: sa.Connection, version_id: str, holder: str, problem: str | None = None
) -> bool:
    """All that can be packed is stored; or it has failed for good because of `problem`."""
    state = MADE if problem is None else FAILED
    return _change(connection, version_id, holder, state=state, problem=problem, holder=None)


def next_number(connection: sa.Connection, version_id: str) -> int:
    query = sa.select(sa.func.max(_P.number)).where(_P.version_id == version_id)
    return (connection.execute(query).scalar() or 0) + 1


def record(
    connection: sa.Connection,
    package: Package,
    datum_ids: Sequence[str],
    *,
    holder: str,
    now: datetime,
) -> bool:
    """The package of these files is stored and known from now on.

    False when it must not be used: the claim is lost, or its upload was given up.
    """
    if not keep(connection, package.version_id, holder, now):
        return False
    if not own_uploads.settle(connection, [package.key]):
        return False
    connection.execute(t.packages.insert().values(**vars(package)))
    for start in range(0, len(datum_ids), CHUNK):
        these = _F.datum_id.in_(datum_ids[start : start + CHUNK])
        mine = sa.and_(_F.version_id == package.version_id, these)
        connection.execute(t.dataset_files.update().where(mine).values(package_id=package.id))
    return True


def _change(connection: sa.Connection, version_id: str, mine: str, **values: Any) -> bool:
    held = sa.and_(_G.version_id == version_id, _G.state == WANTED, _G.holder == mine)
    return connection.execute(t.packagings.update().where(held).values(**values)).rowcount == 1
