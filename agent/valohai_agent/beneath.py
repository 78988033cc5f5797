"""Files in directories that a running command writes in: found, read, taken and removed without following one link.

The command may exchange a directory for a link at any moment, also between two steps of ours, and a link may lead to
any file of this host. So a path is never handed to the system as a whole: each step is opened from the one before, and
refused if it is a link. Whatever is opened that way lies below the directory we began with.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MAX_PATH_BYTES = (
    4095  # as the system has it; deeper trees would cost a step for each directory each time
)
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC  # never waits for a FIFO's end
_NOT_REGULAR = frozenset({errno.ELOOP, errno.ENXIO, errno.ENODEV})  # a link, a socket


class NotRegular(OSError):
    """There is something, but no regular file."""

    def __init__(self) -> None:
        super().__init__(errno.EINVAL, "not a regular file")


@dataclass(frozen=True, kw_only=True)
class Place:
    """`relative` below `root`. The way to `root` itself is the agent's own and is followed as it is."""

    root: Path
    relative: str

    def status(self) -> os.stat_result:
        """Of a link itself."""
        with self._parent() as (parent, name):
            return os.stat(name, dir_fd=parent, follow_symlinks=False)

    def target(self) -> str:
        """Where a link leads."""
        with self._parent() as (parent, name):
            return os.readlink(name, dir_fd=parent)

    def open(self) -> IO[bytes]:
        """Raises NotRegular for everything but a regular file."""
        with self._parent() as (parent, name):
            try:
                fd = os.open(name, _READ, dir_fd=parent)
            except OSError as error:
                if error.errno in _NOT_REGULAR:
                    raise NotRegular from error
                raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise NotRegular
        return os.fdopen(fd, "rb")

    def list(self) -> list[tuple[str, os.stat_result]]:
        """Names in this directory, sorted, each with its status; what vanishes meanwhile is left out."""
        found = []
        with _directory(self.root, self.relative, _LIST) as fd:
            for name in sorted(os.listdir(fd)):
                with contextlib.suppress(FileNotFoundError):
                    found.append((name, os.stat(name, dir_fd=fd, follow_symlinks=False)))
        return found

    def remove(self) -> None:
        """Removes the file, or the link itself; one that is gone already is fine."""
        with contextlib.suppress(FileNotFoundError), self._parent() as (parent, name):
            os.unlink(name, dir_fd=parent)

    def move(self, target: Place, seen: os.stat_result) -> bool:
        """Renames the regular file that was `seen` here; whether it was still that one, unchanged.

        What has come in its place is put back, unless there is something else again.
        """
        with self._parent() as (parent, name), target._parent() as (there, new):
            os.rename(name, new, src_dir_fd=parent, dst_dir_fd=there)
            found = os.stat(new, dir_fd=there, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode) and _same(found, seen):
                return True
            try:
                os.link(new, name, src_dir_fd=there, dst_dir_fd=parent, follow_symlinks=False)
            except FileExistsError:
                pass
            except OSError:  # a directory, or another user's file: no second name is allowed for it
                os.rename(new, name, src_dir_fd=there, dst_dir_fd=parent)
                return False
            os.unlink(new, dir_fd=there)
            return False

    @contextlib.contextmanager
    def _parent(self) -> Iterator[tuple[int, str]]:
        directory, _, name = self.relative.rpartition("/")
        with _directory(self.root, directory, _STEP) as fd:
            yield fd, name or "."


def _same(found: os.stat_result, seen: os.stat_result) -> bool:
    """The number of a removed file is given away again at once, so it is not enough."""
    return os.path.samestat(found, seen) and (
        (found.st_mode, found.st_size, found.st_mtime_ns)
        == (seen.st_mode, seen.st_size, seen.st_mtime_ns)
    )


@contextlib.contextmanager
def _directory(root: Path, relative: str, flags: int) -> Iterator[int]:
    """The directory, opened step by step."""
    steps = [step for step in relative.split("/") if step not in ("", ".")]
    if ".." in steps:
        raise OSError(errno.EINVAL, "a path that leads upwards")
    if len(os.fsencode(relative)) > MAX_PATH_BYTES:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    fd = os.open(
        root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC if steps else flags & ~os.O_NOFOLLOW
    )
    try:
        for number, step in enumerate(steps, 1):
            last = number == len(steps)
            following = os.open(step, flags if last else _STEP, dir_fd=fd)
            os.close(fd)
            fd = following
        yield fd
    finally:
        os.close(fd)
