"""Which contents the cache of this machine holds, and under which names: a small database that all agents share.

A name says where a content comes from (`<uri>@<version>`, `<url>#<etag>`, `datum:<id>`) or what it is
(`sha256:<hex>`). Only the digests of names are kept. Nothing here looks at the files themselves.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valohai_agent.cache.worth import Kept, worth
from valohai_agent.protocol import MARK_CHARACTERS, Checksums, name_digest

BUSY_SECONDS = 30.0
CHUNK = 500  # of values in one statement
CHECKPOINT_PAGES = 8000  # 32 MB: many small files in a row cost few writes to the database itself
_SCHEMA = """
CREATE TABLE IF NOT EXISTS content (
    sha256 TEXT PRIMARY KEY, md5 TEXT, sha1 TEXT, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
    seconds REAL NOT NULL, uses INTEGER NOT NULL, used_at REAL NOT NULL,
    verified_at REAL NOT NULL, worth REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS content_by_worth ON content (worth, used_at, sha256, size);
CREATE INDEX IF NOT EXISTS content_by_size ON content (size);
CREATE TABLE IF NOT EXISTS names (digest TEXT PRIMARY KEY, sha256 TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS names_by_content ON names (sha256);
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO state VALUES ('clock', 0.0);
"""
_PUT = """
INSERT INTO content VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ? + (SELECT value FROM state WHERE name = 'clock'))
ON CONFLICT (sha256) DO UPDATE SET mtime_ns = excluded.mtime_ns, inode = excluded.inode,
    seconds = excluded.seconds, uses = uses + 1, used_at = excluded.used_at,
    verified_at = excluded.verified_at, worth = MAX(worth, excluded.worth)
"""
_CONTENT = "sha256, md5, sha1, size, mtime_ns, inode, seconds, uses, used_at, verified_at"


@dataclass(frozen=True, kw_only=True)
class Content:
    """One stored content. `mtime_ns` and `inode` tell, with the size, whether its file was touched since.

    The time of the last change of the inode is no part of that: each link that a job gets or gives back moves it.
    """

    checksums: Checksums
    size: int
    mtime_ns: int
    inode: int
    seconds: float = 0.0
    uses: int = 1
    used_at: float = 0.0
    verified_at: float = 0.0

    @property
    def sha256(self) -> str:
        return self.checksums.sha256 or ""


@dataclass(eq=False)
class _Entry:
    """What one thread adds. `done`: somebody has tried to write it; `error`: why that failed."""

    row: tuple[Any, ...]
    names: list[tuple[str, str]]
    done: bool = False
    error: BaseException | None = None


class Index:
    """Safe to use from several threads and processes. Raises sqlite3.Error where the disk does."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._pending_lock = threading.Lock()
        self._pending: list[_Entry] = []
        self._db = _opened(path)
        self.close = weakref.finalize(self, self._db.close)

    # -- reading --------------------------------------------------------------------------------------------------
    def find(self, names: Iterable[str]) -> dict[str, Content]:
        """The contents of those names that are known."""
        digests = {name_digest(name): name for name in names}
        found: dict[str, Content] = {}
        for chunk in _chunks(list(digests)):
            query = f"SELECT digest, {_CONTENT} FROM names JOIN content USING (sha256) WHERE digest IN ({_marks(chunk)})"  # noqa: S608
            for digest, *row in self._rows(query, chunk):
                found[digests[digest]] = _content(row)
        return found

    def known(self, contents: Sequence[str]) -> set[str]:
        """Those of the contents that have an entry."""
        found: set[str] = set()
        for chunk in _chunks(contents):
            query = f"SELECT sha256 FROM content WHERE sha256 IN ({_marks(chunk)})"  # noqa: S608
            found.update(row[0] for row in self._rows(query, chunk))
        return found

    def size(self) -> int:
        """Bytes of all contents."""
        return self._rows("SELECT COALESCE(SUM(size), 0) FROM content")[0][0]

    def cheapest(self, limit: int, after: Kept | None = None) -> list[Kept]:
        """What to evict first, in order; behind `after`."""
        last = (after.worth, after.used_at, after.key) if after else (-1.0, 0.0, "")
        query = (
            "SELECT sha256, size, worth, used_at FROM content WHERE (worth, used_at, sha256) > (?, ?, ?) "
            "ORDER BY worth, used_at, sha256 LIMIT ?"
        )
        return [
            Kept(key=key, size=size, worth=value, used_at=used_at)
            for key, size, value, used_at in self._rows(query, [*last, limit])
        ]

    def marks(self, limit: int) -> list[str]:
        """Short digests of the names of the `limit` largest contents (`content_mark`): each has one or two."""
        largest = "SELECT sha256 FROM content ORDER BY size DESC LIMIT ?"
        query = f"SELECT substr(digest, 1, {MARK_CHARACTERS}) FROM names WHERE sha256 IN ({largest}) LIMIT ?"  # noqa: S608
        return [row[0] for row in self._rows(query, [limit, 2 * limit])]

    def unverified(self, before: float) -> Content | None:
        """The one whose bytes were looked at longest ago, if that was earlier than `before`."""
        query = f"SELECT {_CONTENT} FROM content WHERE verified_at < ? ORDER BY verified_at LIMIT 1"  # noqa: S608
        rows = self._rows(query, [before])
        return _content(rows[0]) if rows else None

    # -- writing --------------------------------------------------------------------------------------------------
    def put(self, content: Content, names: Iterable[str]) -> None:
        """Adds the content, or what is new about it, and lets the names stand for it.

        What several threads add at once goes to the disk together, by whoever is first. When that fails, it fails
        for all of them.
        """
        c, digests = content, [(name_digest(name), content.sha256) for name in names]
        value = worth(clock=0.0, seconds=c.seconds, size=c.size, uses=c.uses)
        sums = (c.sha256, c.checksums.md5, c.checksums.sha1)
        times = (c.seconds, c.uses, c.used_at, c.verified_at, value)
        mine = _Entry((*sums, c.size, c.mtime_ns, c.inode, *times), digests)
        with self._pending_lock:
            self._pending.append(mine)
        with self._lock:
            if not mine.done:
                with self._pending_lock:
                    entries, self._pending = self._pending, []
                self._write(entries)
            elif mine.error is not None:
                raise sqlite3.OperationalError(str(mine.error)) from mine.error

    def used(self, contents: Sequence[Content], now: float) -> None:
        """They were wanted again."""
        with self._writing() as db:
            clock = self._clock()
            rows = [
                (
                    worth(clock=clock, seconds=c.seconds, size=c.size, uses=c.uses + 1),
                    now,
                    c.sha256,
                )
                for c in contents
            ]
            db.executemany(
                "UPDATE content SET uses = uses + 1, worth = ?, used_at = ? WHERE sha256 = ?", rows
            )

    def verified(self, content: Content, now: float) -> None:
        """Its bytes are right; `content` has the file's facts as they are now."""
        with self._writing() as db:
            db.execute(
                "UPDATE content SET mtime_ns = ?, inode = ?, verified_at = ? WHERE sha256 = ?",
                (content.mtime_ns, content.inode, now, content.sha256),
            )

    def drop(self, sha256: str, *, evicted: bool = False) -> None:
        """Forgets the content and its names. An eviction moves the clock (see `worth`)."""
        with self._writing() as db:
            if evicted:
                db.execute(
                    "UPDATE state SET value = MAX(value, (SELECT worth FROM content WHERE sha256 = ?1)) "
                    "WHERE name = 'clock' AND EXISTS (SELECT 1 FROM content WHERE sha256 = ?1)",
                    [sha256],
                )
            db.execute("DELETE FROM names WHERE sha256 = ?", [sha256])
            db.execute("DELETE FROM content WHERE sha256 = ?", [sha256])

    def forget(self, name: str) -> None:
        """The name stands for nothing any more; the content stays."""
        with self._writing() as db:
            db.execute("DELETE FROM names WHERE digest = ?", [name_digest(name)])

    # -- inside ---------------------------------------------------------------------------------------------------
    def _write(self, entries: Sequence[_Entry]) -> None:
        try:
            with self._writing() as db:
                db.executemany(_PUT, [entry.row for entry in entries])
                pairs = [pair for entry in entries for pair in entry.names]
                db.executemany("INSERT OR REPLACE INTO names VALUES (?, ?)", pairs)
        except BaseException as error:
            for entry in entries:
                entry.error = error
            raise
        finally:
            for entry in entries:
                entry.done = True

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _clock(self) -> float:
        return self._rows("SELECT value FROM state WHERE name = 'clock'")[0][0]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


def _opened(path: Path) -> sqlite3.Connection:
    """The database; a damaged one is replaced by an empty one, and its files are swept away later."""
    try:
        return _connected(path)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        return _connected(path)


def _connected(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        db.executescript(_SCHEMA)
        if db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("the index is damaged")
    except BaseException:
        db.close()
        raise
    return db


def _content(row: Sequence[Any]) -> Content:
    sha256, md5, sha1, size, mtime_ns, inode, seconds, uses, used_at, verified_at = row
    return Content(
        checksums=Checksums(md5=md5, sha1=sha1, sha256=sha256),
        size=size,
        mtime_ns=mtime_ns,
        inode=inode,
        seconds=seconds,
        uses=uses,
        used_at=used_at,
        verified_at=verified_at,
    )


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]


def _marks(values: Sequence[str]) -> str:
    return ", ".join("?" * len(values))
