"""Which files of a directory belong to the code archive (S-30 to S-32).

Two views: a *commit* is everything that Git tracks; an *ad-hoc* package is what Git tracks or would offer to add,
without top-level dot files and without what `.vhignore` names. A directory without Git is walked, honouring `.gitignore`
files and skipping hidden names.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from valohai_dagster.errors import ProjectError
from valohai_dagster.projects.git import Git

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

IGNORE_FILES = (".vhignore", ".valohaiignore")
MAX_FILES = 10_000
LARGE_FILE = 50 * 10**6
LARGE_TOTAL = 150 * 10**6
MAX_RAW = 2_000 * 10**6
MAX_PACKED = 1_000 * 10**6


@dataclass(frozen=True, kw_only=True)
class FileList:
    """Relative names with `/`, sorted; `digest` changes when any of them does."""

    names: tuple[str, ...]
    digest: str
    newest_mtime_ns: int
    warnings: tuple[str, ...] = ()


def adhoc_files(root: Path, git: Git | None) -> FileList:
    """S-30. `git` None: walk. ProjectError beyond the limits of S-32."""
    names = _git_names(git, root, others=True) if git else _walk(root)
    ignored = ignore_spec(root)
    chosen = [name for name in names if not name.startswith(".") and not ignored.match_file(name)]
    return _checked(root, chosen, limits=True)


def tracked_files(root: Path, git: Git) -> FileList:
    """Everything that Git tracks below `root`; no limits, since whoever committed it meant it."""
    return _checked(root, _git_names(git, root, others=False), limits=False)


def checkout_files(root: Path) -> FileList:
    """Everything in the tree of a checkout except Git's own files; submodules are ordinary directories here."""
    return _checked(root, _all_files(root), limits=False)


def ignore_spec(root: Path) -> GitIgnoreSpec:
    lines: list[str] = []
    for name in IGNORE_FILES:
        lines += _lines(root / name)
    return _spec_of(lines)


def _spec_of(lines: Iterable[str]) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec

    return GitIgnoreSpec.from_lines(lines)


# -- names -------------------------------------------------------------------------------------------------------


def _git_names(git: Git, root: Path, *, others: bool) -> list[str]:
    out = git.run("ls-files", "-z", "--cached", "--recurse-submodules", cwd=root)
    if others:
        out += git.run("ls-files", "-z", "--others", "--exclude-standard", cwd=root)
    names = dict.fromkeys(name for name in out.split("\0") if name)
    return [name for name in names if os.path.lexists(root / name)]


def _walk(root: Path) -> Iterator[str]:
    """Hidden names are skipped everywhere (S-30)."""
    yield from _walk_below(root, "", [])


def _walk_below(root: Path, prefix: str, specs: list[tuple[str, GitIgnoreSpec]]) -> Iterator[str]:
    directory = root / prefix if prefix else root
    lines = _lines(directory / ".gitignore")
    if lines:
        specs = [*specs, (prefix, _spec_of(lines))]
    for entry in _entries(directory):
        name = f"{prefix}{entry.name}"
        if entry.name.startswith("."):
            continue
        is_directory = entry.is_dir(follow_symlinks=False)
        path = f"{name}/" if is_directory else name
        if any(spec.match_file(path.removeprefix(base)) for base, spec in specs):
            continue
        if is_directory:
            yield from _walk_below(root, path, specs)
        else:
            yield name


def _all_files(root: Path) -> Iterator[str]:
    todo = [""]
    while todo:
        prefix = todo.pop()
        for entry in _entries(root / prefix if prefix else root):
            if entry.name == ".git":
                continue
            if entry.is_dir(follow_symlinks=False):
                todo.append(f"{prefix}{entry.name}/")
            else:
                yield f"{prefix}{entry.name}"


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise ProjectError(f"cannot read the directory {directory}: {error.strerror}") from error


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []


# -- checks ------------------------------------------------------------------------------------------------------


def _checked(root: Path, names: Iterable[str], *, limits: bool) -> FileList:
    warnings: list[str] = []
    chosen: list[str] = []
    digest = hashlib.sha256()
    total = newest = 0
    for name in sorted(names, key=os.fsencode):
        status = (root / name).lstat()
        refusal = _refusal(root, name, status)
        if refusal:
            warnings.append(f"{name!r} is not packed: {refusal}")
            continue
        chosen.append(name)
        link = os.readlink(root / name) if stat.S_ISLNK(status.st_mode) else ""
        facts = (name, status.st_mode, status.st_size, status.st_mtime_ns, link)
        digest.update(repr(facts).encode("utf-8", "surrogateescape"))
        newest = max(newest, status.st_mtime_ns)
        total += status.st_size
        if status.st_size >= LARGE_FILE:
            warnings.append(
                f"{name!r} has {status.st_size / 10**6:,.0f} MB; data belongs into inputs"
            )
    if total > LARGE_TOTAL:
        warnings.append(
            f"the project has {total / 10**6:,.0f} MB; list what is not code in .vhignore"
        )
    if limits:
        _refuse_huge(root, chosen, total)
    return FileList(
        names=tuple(chosen),
        digest=digest.hexdigest(),
        newest_mtime_ns=newest,
        warnings=tuple(warnings),
    )


def _refusal(root: Path, name: str, status: os.stat_result) -> str | None:
    if stat.S_ISREG(status.st_mode):
        return None
    if stat.S_ISLNK(status.st_mode):
        return "it links out of the project" if _leads_out(name, os.readlink(root / name)) else None
    if stat.S_ISDIR(status.st_mode):
        return "it is a Git repository of its own; add it as a submodule"
    return "it is no regular file"


def _leads_out(name: str, target: str) -> bool:
    """By the text alone: what the link means on a worker, where nothing but the tree exists."""
    if target.startswith("/"):
        return True
    depth = len(PurePosixPath(name).parts) - 1
    for part in target.split("/"):
        depth += -1 if part == ".." else 0 if part in ("", ".") else 1
        if depth < 0:
            return True
    return False


def _refuse_huge(root: Path, names: list[str], total: int) -> None:
    if len(names) > MAX_FILES:
        raise ProjectError(
            f"{root} has {len(names):,} files, an ad-hoc package takes {MAX_FILES:,} (S-32): "
            "list what is not code in .vhignore, or commit it"
        )
    if total > MAX_RAW:
        raise ProjectError(
            f"{root} has {total / 10**6:,.0f} MB, an ad-hoc package takes {MAX_RAW // 10**6:,} MB (S-32): "
            "list data directories in .vhignore and bring data in as inputs"
        )
