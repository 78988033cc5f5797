"""Removal of directory trees that user code may have made hard to remove."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path


def remove_tree(path: Path) -> None:
    """Removes a tree; directories without permissions are opened first, links are never followed.

    Raises the OSError of the first entry that stays, after trying all others. Does what the process
    may do: files of another user need `Runtime.remove_tree`.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    first = None
    for entry in _entries(path):
        try:
            remove_tree(entry) if _is_directory(entry) else entry.unlink()
        except OSError as error:
            first = first or error
    if first is not None:
        raise first
    path.rmdir()


def open_tree(path: Path) -> None:
    """Gives the owner rights to list and read everything below `path`, without touching write bits of files."""
    _allow(path, 0o700)
    for entry in _entries(path):
        if _is_directory(entry):
            open_tree(entry)
        elif entry.is_file() and not entry.is_symlink():
            _allow(entry, 0o400)


def first_unreadable(path: Path) -> Path | None:
    """The first entry that this process cannot read, or None."""
    if not os.access(path, os.R_OK | os.X_OK):
        return path
    for entry in _entries(path):
        if _is_directory(entry):
            found = first_unreadable(entry)
            if found is not None:
                return found
        elif _is_file(entry) and not os.access(entry, os.R_OK):
            return entry
    return None


def _entries(path: Path) -> Iterator[Path]:
    _allow(path, 0o700)
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        yield path / name


def _is_directory(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _allow(path: Path, bits: int) -> None:
    status = path.lstat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & bits != bits and status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode):
        path.chmod(mode | bits)
