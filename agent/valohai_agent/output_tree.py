"""Finds what is to be uploaded below an outputs directory, without leaving the job's own files (O-16)."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Callable, Iterator, Mapping
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


@dataclass(frozen=True, kw_only=True)
class Unresolved:
    """A link that is no file of the four directories: the absolute path it leads to, and what is wrong with that.

    `outside` when the path lies elsewhere in what the command saw, where the runtime may still have it.
    """

    path: str
    reason: str
    outside: bool = False


def outside_links(workspace: Workspace, valohai_dir: str) -> Iterator[tuple[str, str]]:
    """Outputs that are links out of the job's directories, each with the path that it leads to."""
    for relative, status in _walk(workspace.outputs, "", lambda message: None):
        if stat.S_ISLNK(status.st_mode):
            target = resolve_link(workspace, valohai_dir, relative)
            if isinstance(target, Unresolved) and target.outside:
                yield relative, target.path


def uploadable_files(
    workspace: Workspace,
    valohai_dir: str,
    warn: Callable[[str], None],
    linked: Mapping[str, Path | Unresolved] | None = None,
) -> list[TreeFile]:
    """All that O-01 and O-16 upload: regular files, and links to regular files of this job.

    `linked` holds what became of links out of the four directories: a copy of the file, or why there is none.
    Links to anything else, FIFOs, sockets and devices are skipped with a warning each.
    """
    linked = linked or {}
    found = []
    for relative, status in _walk(workspace.outputs, "", warn):
        path = workspace.outputs / relative
        if stat.S_ISREG(status.st_mode):
            found.append(_file(relative, path, status))
        elif stat.S_ISLNK(status.st_mode):
            target = linked.get(relative) or resolve_link(workspace, valohai_dir, relative)
            if isinstance(target, Unresolved):
                words = f"a link to {target.path!r}, {target.reason}"
                warn(f"Output {relative!r} is {words}; it is not uploaded.")
            else:
                found.append(_file(relative, target, target.stat()))
        else:
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
            warn(f"Output {relative!r} is {kind}; it is not uploaded.")
    return found


def resolve_link(workspace: Workspace, valohai_dir: str, relative: str) -> Path | Unresolved:
    """Follows a link of the outputs as the command would have seen it; see `resolve`."""
    return resolve(workspace, valohai_dir, f"{valohai_dir}/outputs/{relative}")


def resolve(workspace: Workspace, valohai_dir: str, path: str) -> Path | Unresolved:
    """The regular file at a path as the command would have seen it.

    Each step is resolved by hand below the four directories of the job, so that no link reaches a
    file of the worker.
    """
    base = valohai_dir.strip("/").split("/")
    todo = path.split("/")
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
            whole = posixpath.normpath("/" + "/".join([*current, part, *todo]))
            return Unresolved(path=whole, reason="outside the job's directories", outside=True)
        if real is not None and real.is_symlink():
            links += 1
            if links > MAX_LINKS:
                return Unresolved(path=path, reason="which leads back to itself")
            target = os.readlink(real)
            current = [] if target.startswith("/") else current
            todo = [*target.split("/"), *todo]
            continue
        current.append(part)
    return _regular(_real(workspace, base, current), "/" + "/".join(current))


def _regular(real: Path | None, shown: str) -> Path | Unresolved:
    if real is None or real.is_dir():
        return Unresolved(path=shown, reason="a directory")
    try:
        mode = real.lstat().st_mode
    except OSError:
        return Unresolved(path=shown, reason="which does not exist")
    return real if stat.S_ISREG(mode) else Unresolved(path=shown, reason="which is no regular file")


def _real(workspace: Workspace, base: list[str], parts: list[str]) -> Path | None:
    """Where a path of the command is on disk; None outside of the visible directories."""
    below = parts[len(base) :]
    if parts[: len(base)] != base or not below or below[0] not in VISIBLE:
        return None
    return workspace.locate(*below)


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
