"""Published agent files: one is current, older ones are kept so that one can go back to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy as sa
from packaging.version import InvalidVersion, Version

from valohai_agent.machine.messages import FILE_PATH, AgentFile
from valohai_dagster.capacity.bootstrap.agent_file import describe
from valohai_dagster.errors import RefusedError, StoreConflict
from valohai_dagster.records.capacity_tables import agent_releases as table
from valohai_dagster.records.engine import Records
from valohai_dagster.records.store import insert_ignore
from valohai_dagster.settings import Settings
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.registry import Stores

FILE_NAME = "valohai-agent.pyz"
URL_LIFE = timedelta(hours=6)  # longer than any machine takes to boot
WINDOW = 1  # minor versions that an agent may be away from the current one


@dataclass(frozen=True, kw_only=True)
class Release:
    """One published file."""

    version: str
    sha256: str
    store: str
    key: str
    size: int
    protocol: int
    protocol_min: int
    current: bool
    ctime: datetime


def current_release(conn: sa.Connection) -> Release | None:
    """The one that new machines get; None while nothing is published."""
    row = conn.execute(sa.select(table).where(table.c.current)).first()
    return None if row is None else Release(**row._mapping)


def releases(conn: sa.Connection) -> Sequence[Release]:
    """All of them, newest first."""
    rows = conn.execute(sa.select(table).order_by(table.c.ctime.desc(), table.c.version.desc()))
    return [Release(**row._mapping) for row in rows]


def is_outdated(worker_version: str, release: str | None) -> bool:
    """Whether a worker is so far from the current release (its version) that its machine has to be replaced.

    Within the window, one minor version to either side, agents and control planes understand each other, and an agent
    brings itself up to date when it is told to (`update`). Nothing is known of a version that is none.
    """
    if release is None:
        return False
    try:
        mine, current = Version(worker_version), Version(release)
    except InvalidVersion:
        return False
    return mine.major != current.major or abs(mine.minor - current.minor) > WINDOW


def publish(records: Records, store: Store, file: Path, *, now: datetime) -> Release:
    """Puts an agent file into the store and makes it the current one; publishing the same file again is fine.

    Raises RefusedError when the file is no agent file, and what the store raises.
    """
    about = describe(file)
    key = f"agents/{about.version}/{about.sha256[:16]}/{FILE_NAME}"
    known = _find(records, about.version, about.sha256)
    if known is None or store.name != known.store or store.stat(known.key) is None:
        try:
            with file.open("rb") as content:
                store.put(key, content)
        except StoreConflict:  # an earlier try came this far
            _check_stored(store, key, about.size)
    else:
        key = known.key
    values = {
        "version": about.version,
        "sha256": about.sha256,
        "store": store.name,
        "key": key,
        "size": about.size,
        "protocol": about.protocol,
        "protocol_min": about.protocol_min,
        "ctime": now,
    }
    with records.write() as conn:
        if not insert_ignore(conn, table, current=False, **values):
            mine = (table.c.version == about.version) & (table.c.sha256 == about.sha256)
            conn.execute(table.update().where(mine).values(store=store.name, key=key))
        return _make_current(conn, about.version, about.sha256)


def use(records: Records, version: str) -> Release:
    """Makes a published version the current one again. Raises RefusedError when there is none."""
    with records.write() as conn:
        found = [release for release in releases(conn) if release.version == version]
        if not found:
            known = ", ".join(sorted({one.version for one in releases(conn)})) or "none"
            raise RefusedError(
                f"no agent of version {version!r} is published; published: {known}. "
                "Publish one with `valohai-dagster agents publish FILE`"
            )
        return _make_current(conn, version, found[0].sha256)


def offer(release: Release, settings: Settings, stores: Stores) -> AgentFile:
    """The file as a machine gets it: signed by its store, or through our own service where the store signs nothing that
    a machine elsewhere could read."""
    url = stores[release.store].sign_get(release.key, expires=URL_LIFE).url
    if urlsplit(url).scheme not in ("http", "https"):
        url = f"{settings.machines_url}{FILE_PATH}/{release.sha256}/{FILE_NAME}"
    return AgentFile(version=release.version, sha256=release.sha256, size=release.size, url=url)


def _find(records: Records, version: str, sha256: str) -> Release | None:
    with records.read() as conn:
        return next(
            (one for one in releases(conn) if (one.version, one.sha256) == (version, sha256)), None
        )


def _check_stored(store: Store, key: str, size: int) -> None:
    found = store.stat(key)
    if found is None or found.size != size:
        raise RefusedError(
            f"the store {store.name!r} has something else under {key!r} already; remove it there, then publish again"
        )


def _make_current(conn: sa.Connection, version: str, sha256: str) -> Release:
    mine = (table.c.version == version) & (table.c.sha256 == sha256)
    conn.execute(table.update().where(table.c.current).values(current=False))
    conn.execute(table.update().where(mine).values(current=True))
    return Release(**conn.execute(sa.select(table).where(mine)).one()._mapping)
