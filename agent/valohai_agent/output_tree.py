"""Finds what is to be uploaded below an outputs directory, without leaving the job's own files (O-16)."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from valohai_agent.workspace import Workspace

MAX_LINKS = 40
VISIBLE = ("repository", "inputs", "outputs", "config")
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, kw_only=True)
class TreeFile:
    """One regular file: `name` as the datum will have it, `relative` as it is on disk, `path` to read."""

    name: str
    relative: str
    path: Path
    mode: int
    mtime: float


def regular_files(root: Path) -> Iterator[TreeFile]:
    """Regular files below `root` in a stable order; links and special files are left out."""
    for relative, status in _walk(root, "", lambda message: None):
        if stat.S_ISREG(status.st_mode):
            yield _file(relative, root / relative, status)


def uploadable_files(
    workspace: Workspace, valohai_dir: str, warn: Callable[[str], None]
) -> list[TreeFile]:
    """All that O-01 and O-16 upload: regular files, and links to regular files of this job.

    Links out of `/valohai`, to directories or to nothing, FIFOs, sockets and devices are skipped with a
    warning each.
    """
    found = []
    for relative, status in _walk(workspace.outputs, "", warn):
        path = workspace.outputs / relative
        if stat.S_ISREG(status.st_mode):
            found.append(_file(relative, path, status))
        elif stat.S_ISLNK(status.st_mode):
            target = resolve_link(workspace, valohai_dir, relative)
            if isinstance(target, str):
                warn(f"Output {relative!r} is a link {target}; it is not uploaded.")
            else:
                found.append(_file(relative, target, target.stat()))
        else:
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
            warn(f"Output {relative!r} is {kind}; it is not uploaded.")
    return found


def resolve_link(workspace: Workspace, valohai_dir: str, relative: str) -> Path | str:
    """Follows a link of the outputs as the command would have seen it; the reason as text if it cannot.

    Each step is resolved by hand below the four directories of the job, so that no link reaches a
    file of the worker.
    """
    base = valohai_dir.strip("/").split("/")
    todo = [*base, "outputs", *relative.split("/")]
    current: list[str] = []
    links = 0
    while todo:
        part = todo.pop(0)
        if part in ("", "."):
            continue
        if part == "..":
            current = current[:-1]
            continue
        real = _real(workspace, base, [*current, part])
        if real is None and base[: len(current) + 1] != [*current, part]:
            return f"to {'/' + '/'.join([*current, part])}, outside the job's directories"
        if real is not None and real.is_symlink():
            links += 1
            if links > MAX_LINKS:
                return "that leads to itself"
            target = os.readlink(real)
            current = [] if target.startswith("/") else current
            todo = [*target.split("/"), *todo]
            continue
        current.append(part)
    return _regular(_real(workspace, base, current))


def _regular(path: Path | None) -> Path | str:
    if path is None or path.is_dir():
        return "to a directory"
    try:
        mode = path.lstat().st_mode
    except OSError:
        return "to nothing"
    return path if stat.S_ISREG(mode) else "to something that is no regular file"


def _real(workspace: Workspace, base: list[str], parts: list[str]) -> Path | None:
    """Where a path of the command is on disk; None outside of the visible directories."""
    below = parts[len(base) :]
    if parts[: len(base)] != base or not below or below[0] not in VISIBLE:
        return None
    return workspace.root.joinpath(*below)


def _walk(
    root: Path, prefix: str, warn: Callable[[str], None]
) -> Iterator[tuple[str, os.stat_result]]:
    try:
        with os.scandir(root / prefix) as entries:
            names = sorted(entry.name for entry in entries)
    except FileNotFoundError:
        return
    except OSError as error:
        warn(f"The output directory {prefix!r} cannot be read: {error.strerror}.")
        return
    for name in names:
        relative = posixpath.join(prefix, name)
        try:
            status = (root / relative).lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(root, relative, warn)
        else:
            yield relative, status


def _file(relative: str, path: Path, status: os.stat_result) -> TreeFile:
    return TreeFile(
        name=os.fsencode(relative).decode("utf-8", "replace"),
        relative=relative,
        path=path,
        mode=stat.S_IMODE(status.st_mode),
        mtime=status.st_mtime,
    )
