"""The worker's content-keyed cache of input files (I-33, I-35)."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from valohai_agent.protocol import Checksums

DiskFraction = Callable[[Path], float]


@dataclass(frozen=True, kw_only=True)
class Cached:
    """One file of the cache, known to be there when it was looked up."""

    path: Path
    size: int
    checksums: Checksums


def disk_fraction(path: Path) -> float:
    """How full the disk is, 0..1."""
    usage = shutil.disk_usage(path)
    return usage.used / usage.total if usage.total else 1.0


class InputCache:
    """Files by content key, shared by all agents of the host that use the same directory.

    A file is named by the digest of its key; a JSON file beside it holds key, size and checksums. Jobs
    get hard links, so the link count tells what is in use. Writers of one key wait for each other, so
    that two jobs download a file once. The least recently used files go while the disk is fuller
    than `high_water`; files of running jobs never do.
    """

    def __init__(
        self, directory: Path, *, high_water: float = 0.80, fraction: DiskFraction = disk_fraction
    ) -> None:
        self._directory = directory
        self._high_water = high_water
        self._fraction = fraction
        directory.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Holds the key while it is looked up or filled."""
        path = self._file(key).with_suffix(".lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def find(self, key: str, expected: Checksums | None = None) -> Cached | None:
        """The file of this key; a damaged or contradicting entry is dropped and not found."""
        path = self._file(key)
        try:
            facts = json.loads(path.with_suffix(".json").read_text())
            cached = Cached(
                path=path, size=facts["size"], checksums=Checksums(**facts["checksums"])
            )
            fits = path.stat().st_size == cached.size
            os.utime(path.with_suffix(".json"))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not fits or not _agree(cached.checksums, expected):
            self._drop(path)
            return None
        return cached

    def partial(self) -> Path:
        """A fresh name on the cache's disk to download to."""
        return self._directory / f"new-{uuid.uuid4().hex}"

    def add(self, key: str, partial: Path, size: int, checksums: Checksums) -> Cached:
        """Takes a downloaded file; the key then stands for it."""
        path = self._file(key)
        facts = {"key": key, "size": size, "checksums": checksums.model_dump()}
        partial.chmod(0o644)
        os.replace(partial, path)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        temporary.write_text(json.dumps(facts))
        os.replace(temporary, path.with_suffix(".json"))
        return Cached(path=path, size=size, checksums=checksums)

    def make_room(self, size: int = 0) -> int:
        """Evicts least recently used files until the disk is below the mark; gives the freed bytes.

        `size` bytes that are about to arrive count as used.
        """
        freed = 0
        total = max(1, shutil.disk_usage(self._directory).total)
        for meta in self._by_age():
            if self._fraction(self._directory) + size / total <= self._high_water:
                break
            freed += self._evict(meta)
        return freed

    def keys(self, limit: int = 300) -> list[str]:
        """Content keys on this machine, most recently used first: for `Worker.cached`."""
        found = []
        for meta in reversed(self._by_age()):
            with contextlib.suppress(OSError, ValueError, KeyError):
                found.append(json.loads(meta.read_text())["key"])
            if len(found) >= limit:
                break
        return found

    def clear(self) -> int:
        """Removes everything that no running job uses (VH_CLEAN); gives the freed bytes."""
        return sum(self._evict(meta) for meta in self._by_age())

    def _file(self, key: str) -> Path:
        return self._directory / hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()

    def _by_age(self) -> list[Path]:
        metas = []
        for meta in self._directory.glob("*.json"):
            with contextlib.suppress(OSError):
                metas.append((meta.stat().st_mtime_ns, meta))
        return [meta for _, meta in sorted(metas)]

    def _evict(self, meta: Path) -> int:
        path = meta.with_suffix("")
        try:
            status = path.stat()
        except FileNotFoundError:
            meta.unlink(missing_ok=True)
            return 0
        if status.st_nlink > 1:
            return 0
        self._drop(path)
        return status.st_size

    def _drop(self, path: Path) -> None:
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def place(source: Path, target: Path, *, link: bool) -> None:
    """Puts a cached file into a workspace: a hard link if wanted and possible, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source, target)
            return
        except FileExistsError:
            raise
        except OSError:
            pass  # other file system, too many links, or links not allowed here
    shutil.copyfile(source, target)


def _agree(found: Checksums, expected: Checksums | None) -> bool:
    if expected is None:
        return True
    return all(
        getattr(expected, kind) in (None, getattr(found, kind))
        for kind in ("md5", "sha1", "sha256")
    )
