"""Finds what is to be uploaded below an outputs directory, without leaving the job's own files (O-16)."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from valohai_agent.beneath import Place
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
    """One regular file: `name` as the datum will have it, `relative` as it is in the outputs, `place` to read.

    `status` is how it was when it was found.
    """

    name: str
    relative: str
    place: Place
    status: os.stat_result


def regular_files(root: Path) -> Iterator[TreeFile]:
    """Regular files below `root` in a stable order; links and special files are left out."""
    for relative, status in _walk(root, lambda message: None):
        if stat.S_ISREG(status.st_mode):
            yield _file(relative, Place(root=root, relative=relative), status)


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
    for relative, status in _walk(workspace.outputs, lambda message: None):
        if stat.S_ISLNK(status.st_mode):
            target = resolve_link(workspace, valohai_dir, relative)
            if isinstance(target, Unresolved) and target.outside:
                yield relative, target.path


def uploadable_files(
    workspace: Workspace,
    valohai_dir: str,
    warn: Callable[[str], None],
    linked: Mapping[str, Place | Unresolved] | None = None,
) -> list[TreeFile]:
    """All that O-01 and O-16 upload: regular files, and links to regular files of this job.

    `linked` holds what became of links out of the four directories: a copy of the file, or why there is none.
    Links to anything else, FIFOs, sockets and devices are skipped with a warning each.
    """
    linked = linked or {}
    found = []
    for relative, status in _walk(workspace.outputs, warn):
        if stat.S_ISREG(status.st_mode):
            place = Place(root=workspace.outputs, relative=relative)
            found.append(_file(relative, place, status))
        elif stat.S_ISLNK(status.st_mode):
            target = linked.get(relative) or resolve_link(workspace, valohai_dir, relative)
            target = _found(relative, target)
            if isinstance(target, Unresolved):
                words = f"a link to {target.path!r}, {target.reason}"
                warn(f"Output {relative!r} is {words}; it is not uploaded.")
            else:
                found.append(target)
        else:
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
            warn(f"Output {relative!r} is {kind}; it is not uploaded.")
    return found


def resolve_link(workspace: Workspace, valohai_dir: str, relative: str) -> Place | Unresolved:
    """Follows a link of the outputs as the command would have seen it; see `resolve`."""
    return resolve(workspace, valohai_dir, f"{valohai_dir}/outputs/{relative}")


def resolve(workspace: Workspace, valohai_dir: str, path: str) -> Place | Unresolved:
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
        place = _place(workspace, base, [*current, part])
        if place is None and base[: len(current) + 1] != [*current, part]:
            whole = posixpath.normpath("/" + "/".join([*current, part, *todo]))
            return Unresolved(path=whole, reason="outside the job's directories", outside=True)
        target = None if place is None else _target(place)
        if target is not None:
            links += 1
            if links > MAX_LINKS:
                return Unresolved(path=path, reason="which leads back to itself")
            current = [] if target.startswith("/") else current
            todo = [*target.split("/"), *todo]
            continue
        current.append(part)
    return _regular(_place(workspace, base, current), "/" + "/".join(current))


def _regular(place: Place | None, shown: str) -> Place | Unresolved:
    if place is None:
        return Unresolved(path=shown, reason="a directory")
    try:
        mode = place.status().st_mode
    except OSError:
        return Unresolved(path=shown, reason="which does not exist")
    if stat.S_ISDIR(mode):
        return Unresolved(path=shown, reason="a directory")
    return (
        place if stat.S_ISREG(mode) else Unresolved(path=shown, reason="which is no regular file")
    )


def _found(relative: str, target: Place | Unresolved) -> TreeFile | Unresolved:
    """A link's file under the link's name."""
    if isinstance(target, Unresolved):
        return target
    try:
        return _file(relative, target, target.status())
    except OSError:
        return Unresolved(path=target.relative, reason="which does not exist")


def _place(workspace: Workspace, base: list[str], parts: list[str]) -> Place | None:
    """Where a path of the command is on disk; None outside of the visible directories."""
    below = parts[len(base) :]
    if parts[: len(base)] != base or not below or below[0] not in VISIBLE:
        return None
    return workspace.locate(*below)


def _target(place: Place) -> str | None:
    """Where a link leads; None for everything else, or nothing."""
    try:
        return place.target() if stat.S_ISLNK(place.status().st_mode) else None
    except OSError:
        return None


def _walk(root: Path, warn: Callable[[str], None]) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below `root` but directories: path and status, directories in the order of their names."""
    todo: list[tuple[str, os.stat_result]] = _entries(root, "", warn)
    while todo:
        relative, status = todo.pop()
        if stat.S_ISDIR(status.st_mode):
            todo += _entries(root, relative, warn)
        else:
            yield relative, status


def _entries(
    root: Path, prefix: str, warn: Callable[[str], None]
) -> list[tuple[str, os.stat_result]]:
    """What is in one directory, the last name first."""
    try:
        found = Place(root=root, relative=prefix).list()
    except FileNotFoundError:
        return []
    except OSError as error:
        warn(f"The output directory {prefix!r} cannot be read: {error.strerror}.")
        return []
    return [(posixpath.join(prefix, name), status) for name, status in reversed(found)]


def _file(relative: str, place: Place, status: os.stat_result) -> TreeFile:
    return TreeFile(
        name=os.fsencode(relative).decode("utf-8", "replace"),
        relative=relative,
        place=place,
        status=status,
    )
