"""The cache of several machines: contents in a directory of a file server (I-34).

- `objects/ab/<sha256>`: the contents, with a `<sha256>.json` of facts each; its time is that of the last use
- `names/ab/<digest>`: under a name's digest the sha256 that it stands for
- `coming/<id>/`: files on their way, with a `<id>.lease` that their agent moves
- `jobs/<id>/<input>/...`: links to the contents that one job uses in place, with a `<id>.lease` too
- `locks/<digest>`: who fetches what just now (`Leases`)

Everything is published by a rename, so nobody sees a part of a file. Links need one file system below the directory:
NFS and SMB have them. That all this holds on a network file system is by what these promise; tests use a directory of
another file system of the same machine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO

from valohai_agent.cache import leases as lock_files
from valohai_agent.cache.leases import Leases
from valohai_agent.cache.local import (
    CHUNK_BYTES,
    DISK_MARK,
    Cached,
    DiskUsage,
    Wanted,
    agree,
    disk_usage,
    readable,
)
from valohai_agent.cache.locks import Waiting
from valohai_agent.cache.sweeping import FACTS, sweep_names, sweep_objects
from valohai_agent.cache.worth import Kept, Room, aged_worth, choose
from valohai_agent.checksums import Hasher
from valohai_agent.protocol import Checksums, name_digest

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0  # a file server that needs longer for one small file counts as away
UNUSED_SECONDS = 900.0  # what was used later than so long ago stays, whatever its links say
TREE_SECONDS = 3600.0  # what a lease belongs to that did not move for so long is a dead agent's
IN_VAIN_SECONDS = 60.0  # until eviction is tried again after it freed too little
SAMPLE_DIRECTORIES = 8  # of 256: what eviction looks at together
SWEPT_DIRECTORIES = 8  # of 256 of each kind: what one sweep looks through


@dataclass(frozen=True, kw_only=True)
class _Facts:
    size: int
    mtime_ns: int
    md5: str | None
    sha1: str | None
    sha256: str
    seconds: float

    @property
    def checksums(self) -> Checksums:
        return Checksums(md5=self.md5, sha1=self.sha1, sha256=self.sha256)


class Share:
    """Finds, publishes and evicts contents. Methods raise OSError when the file server is in trouble: then the job
    goes the local way.

    With `copy` inputs are copied to the worker's own disk before they are used, else used where they are.
    """

    def __init__(
        self,
        directory: Path,
        *,
        copy: bool = False,
        disk_mark: float = DISK_MARK,
        usage: DiskUsage = disk_usage,
        leases: Leases | None = None,
    ) -> None:
        self.directory, self.copy = directory, copy
        self._disk_mark, self._usage = disk_mark, usage
        self._leases = leases or Leases()
        self._root = directory / "valohai-cache-1"
        self._evicting = threading.Lock()
        self._evict_again = 0.0

    def close(self) -> None:
        self._leases.close()

    def trouble(self) -> str | None:
        """Why it cannot be used just now, in words; None when all is well. A mount that hangs is waited for a while."""
        answer: list[str | None] = []
        asked = threading.Thread(target=lambda: answer.append(self._try()), daemon=True)
        asked.start()
        asked.join(ANSWER_SECONDS)
        return answer[0] if answer else f"it does not answer within {ANSWER_SECONDS:.0f} s"

    def _try(self) -> str | None:
        if not self.directory.is_dir():
            return "there is no such directory on this worker"
        try:
            for part in ("objects", "names", "coming", "jobs", "locks"):
                (self._root / part).mkdir(parents=True, exist_ok=True)
            self._server_now()
        except OSError as error:
            return error.strerror or str(error)
        return None

    # -- contents -------------------------------------------------------------------------------------------------
    def find(self, wanted: Wanted) -> Cached | None:
        """The content, whole: a file whose size or time is not as it was published is read again."""
        for name in wanted.names:
            sha256 = self._content_of(name)
            facts = self._facts(sha256) if sha256 else None
            if facts is None:
                continue
            if not agree(facts.checksums, wanted.checksums):
                self._name(name).unlink(missing_ok=True)
            elif self._is_whole(facts):
                path = self._object(facts.sha256)
                with contextlib.suppress(OSError):
                    os.utime(_facts_path(path))
                return Cached(path=path, size=facts.size, checksums=facts.checksums)
        return None

    @contextlib.contextmanager
    def fetching(self, name: str, waiting: Waiting | None = None) -> Iterator[None]:
        """Holds a name while it is looked up and filled, so that one machine fetches it."""
        with self._leases.held(self._root / "locks" / name_digest(name), waiting):
            yield

    @contextlib.contextmanager
    def arrival(self) -> Iterator[Path]:
        """A fresh name on the share to write to."""
        directory = self._new_directory("coming")
        try:
            yield directory / "file"
        finally:
            self._remove_directory(directory)

    def publish(
        self, wanted: Wanted, arrived: Path, size: int, checksums: Checksums, *, seconds: float
    ) -> Cached:
        """Takes a file that lies on the share; its names then stand for it on all machines."""
        sha256 = checksums.sha256 or ""
        path = self._object(sha256)
        path.parent.mkdir(exist_ok=True)
        mtime_ns = readable(arrived).st_mtime_ns
        os.replace(arrived, path)
        facts = _Facts(
            size=size,
            mtime_ns=mtime_ns,
            md5=checksums.md5,
            sha1=checksums.sha1,
            sha256=sha256,
            seconds=seconds,
        )
        _write(_facts_path(path), json.dumps(asdict(facts)))
        for name in wanted.names:
            if not name.startswith("sha256:"):
                self._name(name).parent.mkdir(exist_ok=True)
                _write(self._name(name), sha256)
        return Cached(path=path, size=size, checksums=checksums)

    # -- jobs -----------------------------------------------------------------------------------------------------
    def tree(self) -> ShareTree:
        """A directory for the inputs of one job."""
        root = self._new_directory("jobs")
        return ShareTree(root, lambda: self._remove_directory(root))

    # -- room -----------------------------------------------------------------------------------------------------
    def make_room(self, coming: int = 0) -> int:
        """Evicts until `coming` bytes fit below the mark, of a part of the contents at a time; gives the freed bytes."""
        freed = 0
        if self._excess(coming) <= 0:
            return freed
        with self._evicting:
            if time.monotonic() < self._evict_again or self._excess(coming) <= 0:
                return freed
            freed = self._evict(coming)
            if self._excess(coming) > 0:
                self._evict_again = time.monotonic() + IN_VAIN_SECONDS
        if freed:
            text, extra = "evicted %d bytes of the shared cache", {"action": "share-evict"}
            log.info(text, freed, extra=extra)
        return freed

    def _evict(self, coming: int) -> int:
        freed = 0
        self.sweep()
        parts = [entry.path for entry in os.scandir(self._root / "objects")]
        random.shuffle(parts)
        now = self._server_now()
        while parts and (excess := self._excess(coming)) > 0:
            sample, parts = parts[:SAMPLE_DIRECTORIES], parts[SAMPLE_DIRECTORIES:]
            kept = [one for part in sample for one in self._kept(Path(part), now)]
            for one in choose(kept, excess, in_use=lambda one: self._in_use(one, now)):
                path = self._object(one.key)
                _facts_path(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                freed += one.size
        return freed

    def sweep(self) -> None:
        """Removes what dead agents left: their jobs' links, their half files and locks; and, in a part of the
        directories at a time, contents that were never published and names of contents that are gone."""
        now = self._server_now()
        for part in ("jobs", "coming"):
            for directory in {path.with_suffix("") for path in (self._root / part).iterdir()}:
                lease = directory.with_suffix(".lease")
                moved = _mtime(lease) or _mtime(directory)
                if moved is not None and now - moved > TREE_SECONDS:
                    shutil.rmtree(directory, ignore_errors=True)
                    lease.unlink(missing_ok=True)
        before = now - TREE_SECONDS
        lock_files.sweep(self._root / "locks", before)
        for part in _some(self._root / "objects"):
            sweep_objects(part, before)
        for part in _some(self._root / "names"):
            sweep_names(part, before, is_kept=lambda sha256: self._object(sha256).exists())

    # -- inside ---------------------------------------------------------------------------------------------------
    def _new_directory(self, part: str) -> Path:
        directory = self._root / part / uuid.uuid4().hex
        lease = directory.with_suffix(".lease")
        lease.touch()
        directory.mkdir()
        self._leases.keep(lease)
        return directory

    def _remove_directory(self, directory: Path) -> None:
        """What cannot be removed now is swept away later, once its lease has not moved for long."""
        lease = directory.with_suffix(".lease")
        self._leases.let_go(lease)
        with contextlib.suppress(OSError):
            shutil.rmtree(directory)
            lease.unlink()

    def _object(self, sha256: str) -> Path:
        return self._root / "objects" / sha256[:2] / sha256

    def _name(self, name: str) -> Path:
        digest = name_digest(name)
        return self._root / "names" / digest[:2] / digest

    def _content_of(self, name: str) -> str | None:
        if name.startswith("sha256:"):
            return name.removeprefix("sha256:").lower()
        try:
            return self._name(name).read_text().strip() or None
        except FileNotFoundError:
            return None

    def _facts(self, sha256: str) -> _Facts | None:
        try:
            return _Facts(**json.loads(_facts_path(self._object(sha256)).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _is_whole(self, facts: _Facts) -> bool:
        path = self._object(facts.sha256)
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) == (facts.size, facts.mtime_ns):
                    return True
                if _sums(file) == facts.checksums:
                    fresh = replace(facts, mtime_ns=status.st_mtime_ns)
                    _write(_facts_path(path), json.dumps(asdict(fresh)))
                    return True
        except FileNotFoundError:
            return False
        text = "the content %s of the shared cache was damaged; it is fetched again"
        log.warning(text, facts.sha256, extra={"action": "share-damaged"})
        _facts_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return False

    def _excess(self, coming: int) -> int:
        used, total = self._usage(self.directory)
        room = Room(cached=0, disk_used=used, disk_total=total, disk_mark=self._disk_mark)
        return room.excess(coming)

    def _kept(self, part: Path, now: float) -> Iterator[Kept]:
        for entry in os.scandir(part):
            facts = None if entry.name.endswith(FACTS) else self._facts(entry.name)
            used_at = _mtime(_facts_path(Path(entry.path))) if facts else None
            if facts is None or used_at is None:
                continue
            value = aged_worth(seconds=facts.seconds, size=facts.size, age=now - used_at)
            yield Kept(key=facts.sha256, size=facts.size, worth=value, used_at=used_at)

    def _in_use(self, one: Kept, now: float) -> bool:
        """As opening the file shows it: links of other machines may be newer than what is remembered of it here."""
        if now - one.used_at < UNUSED_SECONDS:
            return True
        try:
            with self._object(one.key).open("rb") as file:
                return os.fstat(file.fileno()).st_nlink > 1
        except FileNotFoundError:
            return False

    def _server_now(self) -> float:
        """The file server's clock, by which its files have their times. Shows too that it can be written to."""
        probe = self._root / "coming" / f"{uuid.uuid4().hex}.lease"
        try:
            probe.write_text("now")
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


class ShareTree:
    """The links of one job below `root`, in the order of its inputs; gone with `close`."""

    def __init__(self, root: Path, close: Callable[[], None]) -> None:
        self.root = root
        self.close = close

    def link(self, cached: Cached, relative: PurePosixPath) -> None:
        """Raises FileNotFoundError when the content was evicted meanwhile, OSError where there are no links."""
        os.link(cached.path, self.place_of(relative))

    def place_of(self, relative: PurePosixPath) -> Path:
        """Where a file of the inputs lies on the share; its directory is there."""
        target = self.root / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


def _facts_path(path: Path) -> Path:
    return path.with_name(f"{path.name}{FACTS}")


def _some(directory: Path) -> list[Path]:
    parts = list(directory.iterdir())
    return random.sample(parts, min(SWEPT_DIRECTORIES, len(parts)))


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{uuid.uuid4().hex}")
    try:
        fresh.write_text(text)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _sums(file: IO[bytes]) -> Checksums:
    hasher = Hasher()
    while chunk := file.read(CHUNK_BYTES):
        hasher.update(chunk)
    return hasher.checksums()
