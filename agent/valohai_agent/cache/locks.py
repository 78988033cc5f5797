"""Locks that end with whoever held them: between threads and processes of one machine, and between machines of a share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

WAIT_SECONDS = 0.02  # first pause between two looks; doubles
MAX_WAIT_SECONDS = 0.5
RANGES = sys.platform == "linux" and sys.maxsize > 2**32
SLOW_SECONDS = 5.0  # waiting for longer is worth a line in the log


class Waiting:
    """Paces somebody who waits for a lock.

    `tell(seconds)` is called once when it takes long. `check` may raise to end the wait, for a job that is cancelled.
    """

    def __init__(
        self,
        tell: Callable[[float], object] = lambda seconds: None,
        check: Callable[[], object] = lambda: None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._tell, self._check, self._sleep = tell, check, sleep
        self._began = time.monotonic()
        self._pause = WAIT_SECONDS
        self._told = False

    def pause(self) -> None:
        self._check()
        waited = time.monotonic() - self._began
        if waited > SLOW_SECONDS and not self._told:
            self._told = True
            self._tell(waited)
        self._sleep(self._pause)
        self._pause = min(self._pause * 2, MAX_WAIT_SECONDS)


def try_lock(path: Path) -> int | None:
    """An flock on a lock file, or None while somebody else has it. Give it back with `unlock`.

    The file goes with the lock, so that locks of many names leave nothing behind. That is why the file that was
    locked is compared with the one that has the name now.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def unlock(path: Path, fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    os.close(fd)


@contextlib.contextmanager
def held(path: Path, waiting: Waiting | None = None) -> Iterator[None]:
    """Holds the lock file; waits for whoever has it. The kernel frees it when its process ends, however that is."""
    waiting = waiting or Waiting()
    while (fd := try_lock(path)) is None:
        waiting.pause()
    try:
        yield
    finally:
        unlock(path, fd)


@contextlib.contextmanager
def held_name(path: Path, digest: str, waiting: Waiting | None = None) -> Iterator[None]:
    """Holds one of many names: a byte of one file whose place is taken from the digest, so that a lock makes no file.

    Where the system has no such locks of open files, a lock file beside it does the same.
    """
    if not RANGES:
        with held(path.with_name(digest), waiting):
            yield
        return
    waiting = waiting or Waiting()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _locked_byte(fd, _place(digest)):
            waiting.pause()
        yield
    finally:
        os.close(fd)


class HeldNames:
    """Some of the names that `held_name` holds, by one descriptor; nobody is waited for. Of one thread."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._held: set[int] = set()

    def __enter__(self) -> HeldNames:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def take(self, digest: str) -> bool:
        """False while somebody has it, this object too; always where the system has no such locks."""
        place = _place(digest)
        if not RANGES or place in self._held or not _locked_byte(self._fd, place):
            return False
        self._held.add(place)
        return True

    def give_back(self, digest: str) -> None:
        place = _place(digest)
        if place in self._held:
            self._held.remove(place)
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _byte(fcntl.F_UNLCK, place))


def _place(digest: str) -> int:
    return int(digest[:15], 16)


def _byte(kind: int, place: int) -> bytes:
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, place, 1, 0)


def _locked_byte(fd: int, place: int) -> bool:
    wanted = _byte(fcntl.F_WRLCK, place)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
    except (BlockingIOError, PermissionError):
        return False
    return True
