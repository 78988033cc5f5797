"""Removal of directory trees that user code may have made hard to remove, or may still change.

Works from directory to directory by descriptors: one that is exchanged for a link meanwhile is not entered.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_NAMED = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC  # needs no right to read it
_GONE = (FileNotFoundError, NotADirectoryError)  # also: something else is there now
_LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def remove_tree(path: Path) -> None:
    """Removes a tree; directories without permissions are opened first, links are never followed.

    Raises the OSError of the first entry that stays, after trying all others. Does what the process
    may do: files of another user need `Runtime.remove_tree`.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with _opened(path) as fd:
        first = _empty(fd)
    if first is not None:
        raise first
    path.rmdir()


def open_tree(path: Path) -> None:
    """Gives the owner rights to list and read everything below `path`, without touching write bits of files."""
    with _opened(path) as fd:
        _open(fd)


def first_unreadable(path: Path) -> Path | None:
    """The first entry that this process cannot read, or None."""
    if not os.access(path, os.R_OK | os.X_OK):
        return path
    with _opened(path) as fd:
        return _first_unreadable(fd, path)


def _empty(fd: int) -> OSError | None:
    first = None
    for name in os.listdir(fd):
        try:
            if stat.S_ISDIR(_mode(fd, name)):
                with _opened(name, fd) as inner:
                    first = first or _empty(inner)
                os.rmdir(name, dir_fd=fd)
            else:
                os.unlink(name, dir_fd=fd)
        except FileNotFoundError:
            continue
        except OSError as error:
            first = first or error
    return first


def _open(fd: int) -> None:
    for name in os.listdir(fd):
        with contextlib.suppress(*_GONE):
            mode = _mode(fd, name)
            if stat.S_ISDIR(mode):
                with _opened(name, fd) as inner:
                    _open(inner)
            elif stat.S_ISREG(mode) and not mode & 0o400:
                with _closing(os.open(name, _NAMED, dir_fd=fd)) as file:
                    _allow(file, 0o400)


def _first_unreadable(fd: int, path: Path) -> Path | None:
    for name in os.listdir(fd):
        with contextlib.suppress(*_GONE):
            mode = _mode(fd, name)
            if stat.S_ISDIR(mode):
                if not os.access(name, os.R_OK | os.X_OK, dir_fd=fd):
                    return path / name
                with _opened(name, fd) as inner:
                    found = _first_unreadable(inner, path / name)
                if found is not None:
                    return found
            elif stat.S_ISREG(mode) and not os.access(name, os.R_OK, dir_fd=fd):
                return path / name
    return None


@contextlib.contextmanager
def _opened(path: Path | str, parent: int | None = None) -> Iterator[int]:
    """A directory to be listed, with all its owner's rights if it is ours."""
    with _closing(os.open(path, _NAMED | os.O_DIRECTORY, dir_fd=parent)) as named:
        _allow(named, 0o700)
        listed = os.open(".", _LISTED, dir_fd=named)
    with _closing(listed):
        yield listed


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _mode(fd: int, name: str) -> int:
    return os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode


def _allow(fd: int, bits: int) -> None:
    status = os.fstat(fd)
    mode = stat.S_IMODE(status.st_mode)
    if mode & bits != bits and status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode):
        os.chmod(
            f"/proc/self/fd/{fd}", mode | bits
        )  # fchmod refuses a descriptor that only names it
