"""Whether a working directory is as it was, without asking Git: names, sizes and times of its files.

Asking Git takes several processes; this takes one walk. It may say "changed" when nothing of the project did (an
ignored file was written), and then Git is asked; it does not say "unchanged" when something did.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_ENTRIES = 5_000  # a walk of more takes longer than asking Git
_GIT_FILES = ("HEAD", "index", "logs/HEAD", "packed-refs", "info/exclude", "config")


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """`newest_ns` is the last change of any file: one of this very moment may be followed by another unseen."""

    digest: str
    newest_ns: int


def fingerprint(root: Path, *, without: Path | None = None) -> Fingerprint | None:
    """None when the directory is too large or cannot be read. `without`: a directory that is never packed."""
    digest, newest = hashlib.sha256(), 0
    try:
        for count, (name, status) in enumerate(_facts(root, without)):
            if count >= MAX_ENTRIES:
                return None
            parts = (name, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)  # fmt: skip
            digest.update(repr(parts).encode("utf-8", "surrogateescape"))
            newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
    except OSError:
        return None
    return Fingerprint(digest=digest.hexdigest(), newest_ns=newest)


def _facts(root: Path, without: Path | None) -> Iterator[tuple[str, os.stat_result]]:
    """Files and links of the tree, then what of Git decides about commit and ignored files."""
    todo = [root]
    while todo:
        directory = todo.pop()
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if not _is_foreign(entry, without):
                    todo.append(Path(entry.path))
            else:
                yield entry.path, entry.stat(follow_symlinks=False)
    yield from _git_facts(root)


def _is_foreign(entry: os.DirEntry[str], without: Path | None) -> bool:
    """Git's own directory, our state, virtual environments."""
    if entry.name == ".git" or (without is not None and Path(entry.path) == without):
        return True
    return os.path.exists(os.path.join(entry.path, "pyvenv.cfg"))


def _git_facts(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    for directory in (root, *root.parents):
        if directory != root:
            yield from _existing(directory / ".gitignore")
        dot_git = directory / ".git"
        if not dot_git.exists():
            continue
        for home in _git_homes(dot_git):
            head = home / "HEAD"
            reference = head.read_text().removeprefix("ref: ").strip() if head.exists() else ""
            for name in (*_GIT_FILES, reference):
                yield from _existing(home / name)
        return


def _git_homes(dot_git: Path) -> list[Path]:
    """The git directory; of a further worktree its own and the repository's."""
    if dot_git.is_dir():
        return [dot_git]
    own = (dot_git.parent / dot_git.read_text().removeprefix("gitdir: ").strip()).resolve()
    common = own / "commondir"
    return [own, (own / common.read_text().strip()).resolve()] if common.exists() else [own]


def _existing(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    try:
        yield str(path), path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
