"""The cache of this machine: files by content, shared by all agents that use the same directory (I-33, I-35).

- `objects/ab/<sha256>`: the contents; jobs get hard links, so the link count tells what is in use
- `index.db`: what is known about them, and their names (`Index`)
- `coming/<id>/`: files on their way, of one fetch; its `lock` is held while that lives
- `locks/names`: who fetches what just now
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import shutil
import sqlite3
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from valohai_agent.cache.index import Content, Index
from valohai_agent.cache.locks import HeldNames, Waiting, held, held_name, try_lock
from valohai_agent.cache.placing import copy_file
from valohai_agent.cache.worth import Kept, Room, choose
from valohai_agent.checksums import Hasher
from valohai_agent.protocol import Checksums, name_digest

log = logging.getLogger(__name__)

DISK_MARK = 0.80  # I-35
ORPHAN_SECONDS = 600.0  # a content without an entry may be on its way into the index for so long
MARKS = 150  # contents that this machine tells the queue about, the largest
BATCH = 256  # entries looked at together for eviction
CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What somebody looks for: names that may stand for it, best first, and what is known about the content."""

    names: tuple[str, ...]
    checksums: Checksums = field(default_factory=Checksums)


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A content of the cache, known to be there when it was looked up."""

    path: Path
    size: int
    checksums: Checksums


DiskUsage = Callable[[Path], "tuple[int, int]"]


def disk_usage(path: Path) -> tuple[int, int]:
    """Bytes used and bytes in all, as everybody but root may use them."""
    usage = shutil.disk_usage(path)
    return usage.total - usage.free, usage.total


def agree(found: Checksums, expected: Checksums) -> bool:
    """Whether nothing that is expected contradicts what was found."""
    pairs = [(getattr(expected, k), getattr(found, k)) for k in ("md5", "sha1", "sha256")]
    return all(wanted is None or wanted.lower() == have for wanted, have in pairs)


class InputCache:
    """Finds, keeps and evicts contents. No failure of the cache is one of the job: then nothing is found.

    `max_bytes` limits what is kept, `disk_mark` how full the disk may be, 0..1. Beyond either, what is worth least
    goes (`worth`), but never what a job uses. A content is taken for whole while its file has the size, time and
    inode that it had when its bytes were last looked at; otherwise they are looked at again.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int | None = None,
        disk_mark: float = DISK_MARK,
        usage: DiskUsage = disk_usage,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self.max_bytes, self._disk_mark = max_bytes, disk_mark
        self._usage, self._now = usage, now
        self._objects, self._coming = directory / "objects", directory / "coming"
        self._locks = directory / "locks"
        for part in (self._objects, self._coming, self._locks):
            part.mkdir(parents=True, exist_ok=True)
        with held(self._locks / "open"):  # two agents that start at once
            self._index = Index(directory / "index.db")

    def close(self) -> None:
        self._index.close()

    # -- looking up -----------------------------------------------------------------------------------------------
    def find(self, wanted: Wanted) -> Cached | None:
        """The content, its bytes read again if its file was touched. A name that leads to the wrong one is forgotten."""
        with _degrading():
            content = self._candidate(wanted, self._index.find(wanted.names), forget=True)
            if content is not None and (self._untouched(content) or self._verified(content)):
                self._index.used([content], self._now())
                return self._cached(content)
        return None

    def find_all(self, wanted: Sequence[Wanted]) -> list[Cached | None]:
        """Quick hits among many: those that need a second look are not found, ask `find` for them."""
        found: list[Cached | None] = [None] * len(wanted)
        with _degrading():
            known = self._index.find(name for one in wanted for name in one.names)
            hits = []
            for place, one in enumerate(wanted):
                content = self._candidate(one, known)
                if content is not None and self._untouched(content):
                    found[place] = self._cached(content)
                    hits.append(content)
            if hits:
                self._index.used(hits, self._now())
        return found

    def marks(self) -> list[str]:
        """What this machine tells the queue about its contents, for `Worker.cached`."""
        with _degrading():
            return self._index.marks(MARKS)
        return []

    # -- filling --------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def fetching(self, name: str, waiting: Waiting | None = None) -> Iterator[None]:
        """Holds a name while it is looked up and filled, so that a content is fetched once."""
        with held_name(self._locks / "names", name_digest(name), waiting):
            yield

    def fetching_some(self) -> HeldNames:
        """As `fetching`, for many names (by `name_digest`) of which those that somebody else holds are left to him."""
        return HeldNames(self._locks / "names")

    @contextlib.contextmanager
    def arrivals(self) -> Iterator[Path]:
        """A directory on the cache's disk to download to; swept away once its owner is gone."""
        directory, fd = self._new_arrivals()
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(fd)

    def takes(self, size: int | None) -> bool:
        """Whether a file of that size would be kept at all."""
        return self.max_bytes is None or size is None or size <= self.max_bytes

    def add(
        self, wanted: Wanted, arrived: Path, size: int, checksums: Checksums, *, seconds: float
    ) -> Cached:
        """Takes a file that has just arrived; its names then stand for it. Raises OSError."""
        sha256 = checksums.sha256 or ""
        status, now = readable(arrived), self._now()
        path = self._path(sha256)
        try:
            os.replace(arrived, path)
        except FileNotFoundError:
            path.parent.mkdir(exist_ok=True)
            os.replace(arrived, path)
        content = Content(
            checksums=checksums,
            size=size,
            mtime_ns=status.st_mtime_ns,
            inode=status.st_ino,
            seconds=seconds,
            used_at=now,
            verified_at=now,
        )
        with _degrading():
            self._index.put(content, {*wanted.names, f"sha256:{sha256}"})
        return self._cached(content)

    # -- room -----------------------------------------------------------------------------------------------------
    def make_room(self, coming: int = 0) -> int:
        """Evicts what is worth least until `coming` bytes fit; gives the freed bytes."""
        with _degrading():
            excess = self._excess(coming)
            if excess > 0:
                with held(self._locks / "evict"):
                    return self._evict(self._excess(coming))
        return 0

    def clear(self) -> int:
        """Removes everything that no running job uses (VH_CLEAN); gives the freed bytes."""
        with _degrading(), held(self._locks / "evict"):
            return self._evict(self._index.size() + 1, evicted=False)
        return 0

    def sweep(self) -> None:
        """Removes what dead agents left behind: half files, contents that never got an entry."""
        with _degrading():
            for directory in self._coming.iterdir():
                fd = try_lock(directory / "lock")
                if fd is not None:
                    shutil.rmtree(directory, ignore_errors=True)
                    os.close(fd)
            for (
                entry
            ) in self.directory.iterdir():  # of the first releases, which kept all in one place
                if entry.is_file() and not entry.name.startswith("index.db"):
                    entry.unlink(missing_ok=True)
            self._sweep_orphans()

    # -- looking after --------------------------------------------------------------------------------------------
    def verify_oldest(self, before: float, *, pace: Callable[[int], bool]) -> bool:
        """Reads the content again whose bytes were looked at longest ago, if that was before `before`.

        `pace(bytes)` is called after each piece and may wait; False stops. Whether one was looked at to its end.
        """
        with _degrading():
            content = self._index.unverified(before)
            if content is not None:
                return self._verified(content, pace) is not None
        return False

    # -- inside ---------------------------------------------------------------------------------------------------
    def _new_arrivals(self) -> tuple[Path, int]:
        while True:
            directory = self._coming / uuid.uuid4().hex
            directory.mkdir(parents=True)
            with contextlib.suppress(FileNotFoundError):  # swept before it had its lock
                fd = try_lock(directory / "lock")
                if fd is not None:
                    return directory, fd

    def _path(self, sha256: str) -> Path:
        return self._objects / sha256[:2] / sha256

    def _cached(self, content: Content) -> Cached:
        path = self._path(content.sha256)
        return Cached(path=path, size=content.size, checksums=content.checksums)

    def _candidate(
        self, wanted: Wanted, known: dict[str, Content], *, forget: bool = False
    ) -> Content | None:
        for name in wanted.names:
            content = known.get(name)
            if content is None:
                continue
            if agree(content.checksums, wanted.checksums):
                return content
            if forget:
                self._index.forget(name)
        return None

    def _untouched(self, content: Content) -> bool:
        try:
            return _facts(self._path(content.sha256).stat()) == _facts_of(content)
        except OSError:
            return False

    def _verified(
        self, content: Content, pace: Callable[[int], bool] = lambda size: True
    ) -> bool | None:
        """Whether the bytes are what they should be; if not, the content is dropped. None when `pace` stopped."""
        path = self._path(content.sha256)
        hasher = Hasher()
        try:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    hasher.update(chunk)
                    if not pace(len(chunk)):
                        return None
                status = os.fstat(file.fileno())
        except OSError:
            self._drop(content.sha256)
            return False
        if hasher.checksums() != content.checksums:
            text = "the cached content %s was damaged; it is fetched again when it is wanted"
            log.warning(text, content.sha256, extra={"action": "cache-damaged"})
            self._drop(content.sha256)
            return False
        size, mtime_ns, inode = _facts(status)
        self._index.verified(
            dataclasses.replace(content, size=size, mtime_ns=mtime_ns, inode=inode), self._now()
        )
        return True

    def _drop(self, sha256: str) -> None:
        self._path(sha256).unlink(missing_ok=True)
        self._index.drop(sha256)

    def _excess(self, coming: int) -> int:
        used, total = self._usage(self.directory)
        room = Room(
            cached=0 if self.max_bytes is None else self._index.size(),
            disk_used=used,
            disk_total=total,
            max_bytes=self.max_bytes,
            disk_mark=self._disk_mark,
        )
        return room.excess(coming)

    def _evict(self, excess: int, *, evicted: bool = True) -> int:
        freed, last = 0, None
        while freed < excess and (batch := self._index.cheapest(BATCH, last)):
            last = batch[-1]
            for one in choose(batch, excess - freed, in_use=self._in_use):
                if self._remove(one, evicted=evicted):
                    freed += one.size
        if freed:
            text, extra = "evicted %d bytes of cached inputs", {"action": "cache-evict"}
            log.info(text, freed, extra=extra)
        return freed

    def _in_use(self, one: Kept) -> bool:
        try:
            return self._path(one.key).stat().st_nlink > 1
        except OSError:
            return False

    def _remove(self, one: Kept, *, evicted: bool) -> bool:
        """Unless somebody copies it right now."""
        path = self._path(one.key)
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except BlockingIOError:
            return False
        except FileNotFoundError:
            pass
        self._index.drop(one.key, evicted=evicted)
        return True

    def _sweep_orphans(self) -> None:
        now = time.time()
        for directory in self._objects.iterdir():
            files = {entry.name: entry.path for entry in os.scandir(directory)}
            known = self._index.known(list(files))
            for name in files.keys() - known:
                with contextlib.suppress(OSError):
                    if now - os.stat(files[name]).st_ctime > ORPHAN_SECONDS:
                        os.unlink(files[name])


def place(cached: Cached, target: Path, *, link: bool) -> None:
    """Puts a content into a workspace: a hard link if wanted and possible, else a copy.

    Raises FileNotFoundError when the content was evicted meanwhile.
    """
    if link:
        try:
            os.link(cached.path, target)
            return
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError:
            pass  # another file system, too many links, or links are not allowed here
    with cached.path.open("rb") as source:
        fcntl.flock(source, fcntl.LOCK_SH)  # it is in use until the copy is done
        copy_file(source, target)


def readable(path: Path) -> os.stat_result:
    """Lets everybody read the file, whatever the agent's umask: commands may run as anybody."""
    status = path.stat()
    if stat.S_IMODE(status.st_mode) != 0o644:
        path.chmod(0o644)
    return status


def _facts(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _facts_of(content: Content) -> tuple[int, int, int]:
    return content.size, content.mtime_ns, content.inode


@contextlib.contextmanager
def _degrading() -> Iterator[None]:
    """What goes wrong with the cache is logged and ends what was tried, nothing more."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        log.warning("the input cache: %s", error, extra={"action": "cache-trouble"})
