"""Lock files with leases, for machines that share a directory but no kernel.

What is relied on: creating a file with O_EXCL, renaming and linking are atomic on the server (NFS since version 3, SMB,
every local file system), and opening a file shows its attributes as they are (close-to-open consistency). Locks of
the kernel are not used: many NFS servers do not pass them on. A holder moves its file's time; whoever waits watches
that with a clock of its own, so the clocks of the machines need not agree.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from valohai_agent.cache.locks import Waiting

RENEW_SECONDS = 15.0
LEASE_SECONDS = 90.0  # a file that did not move for so long belongs to a dead holder


class Leases:
    """The lock files that this process holds; one thread moves their times while there are any."""

    def __init__(
        self, *, renew_seconds: float = RENEW_SECONDS, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self._renew_seconds, self._lease_seconds = renew_seconds, lease_seconds
        self._lock = threading.Lock()
        self._held: set[Path] = set()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def held(self, path: Path, waiting: Waiting | None = None) -> Iterator[None]:
        """Holds the lock file; waits for its holder, and takes over from a dead one. Raises OSError."""
        token = secrets.token_hex(16)
        waiting, watch = waiting or Waiting(), _Watch(self._lease_seconds)
        while not _created(path, token):
            watch.look(path)
            waiting.pause()
        self.keep(path)
        try:
            yield
        finally:
            self.let_go(path)
            if _token(path) == token:
                path.unlink(missing_ok=True)

    def keep(self, path: Path) -> None:
        """Moves the time of this file from now on."""
        with self._lock:
            self._held.add(path)
            if self._thread is None:
                self._thread = threading.Thread(target=self._renew, name="share", daemon=True)
                self._thread.start()

    def let_go(self, path: Path) -> None:
        with self._lock:
            self._held.discard(path)

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(self._renew_seconds)

    def _renew(self) -> None:
        while not self._closed.wait(self._renew_seconds):
            with self._lock:
                held = list(self._held)
            for path in held:
                with contextlib.suppress(OSError):
                    os.utime(path)


class _Watch:
    """Sees whether a lock file still moves."""

    def __init__(self, lease_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._lease_seconds, self._now = lease_seconds, now
        self._seen: tuple[str, int] | None = None
        self._since = 0.0

    def look(self, path: Path) -> None:
        """Removes the file when its holder is dead."""
        try:
            with path.open() as file:
                seen = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return
        if seen != self._seen:
            self._seen, self._since = seen, self._now()
        elif self._now() - self._since > self._lease_seconds:
            _break(path, seen[0])
            self._seen = None


def sweep(directory: Path, before: float) -> None:
    """Removes the locks whose time has not moved since then, by the server's clock, and half-made ones as old."""
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError), path.open() as file:
            token = file.read()
            if os.fstat(file.fileno()).st_mtime >= before:
                continue
            if "." in path.name:
                path.unlink()
            else:
                _break(path, token)


def _break(path: Path, token: str) -> None:
    """Removes the lock of that holder; another's, which came in between, is put back."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _token(aside) != token:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _created(path: Path, token: str) -> bool:
    """The token is written before the file has its name, so nobody ever reads half of one."""
    fresh = path.with_name(f"{path.name}.{token}")
    fresh.write_text(token)
    try:
        os.link(fresh, path)
    except FileExistsError:
        return False
    finally:
        fresh.unlink()
    return True


def _token(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
