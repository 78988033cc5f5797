"""Archives of commits between a launch, which needs one, and retention, which removes those that nobody needs.

Whoever chooses a commit says so in its row before he relies on the archive, and retention looks at that with the row
locked. An archive that is being removed is noted (`own_uploads`); who publishes the same content meanwhile takes
another key.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import count
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from valohai_dagster.data import own_uploads
from valohai_dagster.errors import StoreConflict
from valohai_dagster.executions.ledger import ensure_commit, ensure_project
from valohai_dagster.executions.spec_model import CommitRef
from valohai_dagster.projects.archive import Archive, archive_key, build_archive, publish
from valohai_dagster.records import tables as t

if TYPE_CHECKING:
    from valohai_dagster.projects.project import Project
    from valohai_dagster.records.engine import Records
    from valohai_dagster.stores.registry import Stores

TOLD = timedelta(
    hours=1
)  # between two times that a commit in use says so; half of what retention grants

_C = t.commits.c
_PLACE = {"archive_store", "archive_key", "archive_sha256", "archive_size"}


def choose_commit(
    records: Records, project: str, identifier: str, now: datetime
) -> CommitRef | None:
    """A commit whose archive is in a store, since it ran or was published before; from now on it stays for a while."""
    with records.read() as conn:
        row = _row(conn, project, identifier)
    if row is not None and (row.used_at is None or row.used_at < now - TOLD):
        with records.write() as conn:
            told = t.commits.update().where(_C.id == row.id).values(used_at=now)
            if conn.execute(told).rowcount == 0:  # removed since the look
                row = None
    if row is None:
        return None
    return CommitRef(**{name: getattr(row, name) for name in CommitRef.model_fields})


def publish_archive(
    project: Project, *, records: Records, stores: Stores, now: datetime
) -> tuple[CommitRef, tuple[str, ...]]:
    """The commit with its archive in the code store and in the records, and warnings about its content.

    Doing it twice is the same as once.
    """
    archive = build_archive(project)
    while True:
        with records.write() as conn:
            key = _key_for(conn, archive, stores.code.name, now)
        commit = CommitRef(**vars(publish(archive, stores.code, key)))
        with records.write() as conn:
            if record_commit(conn, archive.project, commit, now):
                return commit, archive.warnings


def in_code_store(
    commit: CommitRef, project: str, *, records: Records, stores: Stores, now: datetime
) -> CommitRef:
    """The commit with its archive in the present code store, copied there from the one of earlier settings.

    The old one stays where it is, since executions that were launched before name it.
    """
    code = stores.code
    if commit.archive_store == code.name:
        return commit
    with TemporaryFile() as content:
        with stores[commit.archive_store].open(commit.archive_key) as old:
            shutil.copyfileobj(old, content)
        keys = (archive_key(project, commit.archive_sha256, number) for number in count())
        while True:
            key = next(keys)
            if code.stat(key) is None:
                content.seek(0)
                with suppress(StoreConflict):  # somebody else copies it too
                    code.put(key, content)
            moved = commit.model_copy(update={"archive_store": code.name, "archive_key": key})
            with records.write() as conn:
                if record_commit(conn, project, moved, now):
                    return moved


def record_commit(conn: sa.Connection, project: str, commit: CommitRef, now: datetime) -> bool:
    """From now on its archive is this one. False when retention came first: the archive is being removed.

    Retention locks the project too, so one of the two sees what the other did.
    """
    project_id = ensure_project(conn, project, now)
    p = t.projects.c
    conn.execute(sa.select(p.id).where(p.id == project_id).with_for_update())
    if own_uploads.is_going(conn, commit.archive_store, commit.archive_key):
        return False
    ensure_commit(conn, project_id, commit, now)
    known = (_C.project_id == project_id) & (_C.identifier == commit.identifier)
    place = commit.model_dump(include=_PLACE)
    elsewhere = _C.archive_store != commit.archive_store
    conn.execute(t.commits.update().where(known, elsewhere).values(place))
    return True


def _key_for(conn: sa.Connection, archive: Archive, store: str, now: datetime) -> str:
    project_id = ensure_project(conn, archive.project, now)
    content = sa.and_(_C.archive_store == store, _C.archive_sha256 == archive.sha256)
    # Of other commits too: with the last that has this content its archive would go before this one is recorded.
    told = t.commits.update().where(_C.project_id == project_id, content).values(used_at=now)
    rows = conn.execute(told.returning(_C.identifier, _C.archive_key))
    known = {row.identifier: row.archive_key for row in rows}
    if known:
        return known.get(archive.commit.identifier) or min(known.values())
    keys = (archive_key(archive.project, archive.sha256, number) for number in count())
    return next(key for key in keys if not own_uploads.is_going(conn, store, key))


def _row(conn: sa.Connection, project: str, identifier: str) -> sa.Row[Any] | None:
    query = (
        sa.select(t.commits)
        .join(t.projects, t.projects.c.id == _C.project_id)
        .where(t.projects.c.name == project, _C.identifier == identifier)
    )
    return conn.execute(query).one_or_none()
