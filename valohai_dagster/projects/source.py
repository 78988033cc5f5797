"""Where a project's tree comes from: a local directory as it is, one of its commits, or a commit of a remote."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from valohai_dagster.errors import ProjectError
from valohai_dagster.projects.git import Git, GitAuth, GitError, is_git_url, split_credentials
from valohai_dagster.projects.packaging import (
    MAX_PACKED,
    FileList,
    adhoc_files,
    checkout_files,
    ignore_spec,
    tracked_files,
)
from valohai_dagster.projects.repository import (
    FetchedRef,
    find_commit,
    local_repository,
    mirror_of,
    not_found,
)
from valohai_dagster.projects.tarball import Tarball, write_tarball

_SETTLED_SECONDS = 2.0  # a file changed more recently may change again without a new mtime
_KEEP_SECONDS = 14 * 86_400.0  # unused archives in the cache


@dataclass(frozen=True, kw_only=True)
class ProjectSource:
    """Where a project comes from; enough to read another commit of it."""

    location: str  # absolute directory, or Git URL without credentials
    is_git_url: bool
    yaml_path: str = "valohai.yaml"
    name: str = ""
    auth: GitAuth | None = field(default=None, repr=False)
    cache_dir: Path = Path(".valohai/projects")

    @property
    def git(self) -> Git:
        return Git(
            url=self.location if self.is_git_url else "", auth=self.auth, cache_dir=self.cache_dir
        )


@dataclass(frozen=True, kw_only=True)
class Commit:
    """T-02. `identifier` is the Git SHA, or `~` and the tarball's sha256 when uncommitted (T-03)."""

    identifier: str
    ref: str | None = None  # branch or tag asked for, the current branch, or `adhoc`
    adhoc: bool = False


@dataclass(frozen=True, kw_only=True)
class Tree:
    """One commit's files on this host. `files` is set where it had to be listed already."""

    root: Path
    commit: Commit
    tarball: Tarball | None = None  # of ad-hoc trees, whose identifier it gives
    files: int = 0
    warnings: tuple[str, ...] = ()
    tracked_by: Git | None = None  # a clean working directory: only tracked files belong to it


def make_source(
    location: str | Path,
    *,
    yaml_path: str,
    name: str | None,
    auth: GitAuth | None,
    cache_dir: Path,
) -> ProjectSource:
    """Credentials leave the URL here and travel only as `auth`."""
    text = os.fspath(location)
    if is_git_url(text):
        text, auth = split_credentials(text, auth)
        base, is_url = re.split(r"[/:]", text.rstrip("/").removesuffix(".git"))[-1], True
    else:
        directory = Path(text).expanduser().absolute()
        if not directory.is_dir():
            raise ProjectError(
                f"{directory} is no directory: give a project's directory or a Git URL"
            )
        text, base, is_url = str(directory), directory.resolve().name, False
        if _is_bare_repository(directory):
            is_url, base = True, base.removesuffix(".git")
    return ProjectSource(
        location=text,
        is_git_url=is_url,
        yaml_path=_checked_yaml_path(yaml_path),
        name=name or base or "project",
        auth=auth,
        cache_dir=cache_dir.absolute(),
    )


def _is_bare_repository(directory: Path) -> bool:
    return all((directory / name).exists() for name in ("HEAD", "objects", "refs"))


def _checked_yaml_path(yaml_path: str) -> str:
    parts = yaml_path.split("/")
    if not yaml_path or yaml_path.startswith("/") or ".." in parts:
        raise ProjectError(f"yaml_path {yaml_path!r} must be a path below the project's root")
    return "/".join(part for part in parts if part not in ("", "."))


# -- opening -----------------------------------------------------------------------------------------------------


def open_tree(
    source: ProjectSource, revision: str | None = None, *, fetch: bool = False, adhoc: bool = False
) -> Tree:
    """The files of `revision`; without one, a remote's default branch or a local directory as it is."""
    if source.is_git_url:
        if adhoc:
            raise ProjectError(
                f"{source.location} cannot run ad-hoc: only a local directory has uncommitted files"
            )
        return _remote_tree(source, revision, fetch=fetch)
    if revision is not None:
        return _local_commit_tree(source, revision)
    return _directory_tree(source, adhoc=adhoc)


def _remote_tree(source: ProjectSource, revision: str | None, *, fetch: bool) -> Tree:
    mirror = mirror_of(source.git)
    warnings: tuple[str, ...] = ()
    try:
        sha, ref = find_commit(mirror, revision, fetch=fetch)
    except GitError as error:
        known = (
            mirror.resolve(revision) if error.kind == "unreachable" and mirror.exists() else None
        )
        if known is None:
            raise
        (sha, ref), warnings = known, (f"could not fetch, using what was fetched before: {error}",)
    return Tree(
        root=mirror.checkout(sha), commit=Commit(identifier=sha, ref=ref), warnings=warnings
    )


def _local_commit_tree(source: ProjectSource, revision: str) -> Tree:
    root = Path(source.location)
    top = _top_level(source.git, root)
    if top is None:
        raise ProjectError(
            f"{root} is not under Git, so it has no commit `{revision}`: leave the commit empty"
        )
    repository = local_repository(top, source.cache_dir)
    found = repository.resolve(revision)
    if found is None:
        raise not_found(repository, revision)
    tree = repository.checkout(found[0]) / root.resolve().relative_to(top.resolve())
    if not tree.is_dir():
        raise ProjectError(f"commit {found[0]} of {top} has no directory {root.name}")
    return Tree(root=tree, commit=Commit(identifier=found[0], ref=found[1]))


def _directory_tree(source: ProjectSource, *, adhoc: bool) -> Tree:
    """HEAD when clean, else ad-hoc; a directory that Git ignores or does not know is always ad-hoc."""
    root, git = Path(source.location), source.git
    warnings: list[str] = []
    try:
        top = _top_level(git, root)
        usable = top is not None and _is_tracked_or_new(git, root, source.yaml_path)
        if usable and not adhoc and _is_clean(git, root):
            repository = local_repository(root, source.cache_dir)
            head = repository.resolve(None)
            if head is not None:
                return Tree(
                    root=root, commit=Commit(identifier=head[0], ref=head[1]), tracked_by=git
                )
    except GitError as error:
        usable = False
        warnings.append(f"Git cannot be asked, the directory is taken as it is: {error}")
    files = adhoc_files(root, git if usable else None)
    if source.yaml_path not in files.names and (root / source.yaml_path).exists():
        raise ProjectError(f"{source.yaml_path} of {root} is ignored by .vhignore, .gitignore or as a hidden file: it must be packed (S-32)")  # fmt: skip
    tarball = pack(root, files, source.cache_dir, limit=MAX_PACKED)
    commit = Commit(identifier=f"~{tarball.sha256}", ref="adhoc", adhoc=True)
    return Tree(
        root=root,
        commit=commit,
        tarball=tarball,
        files=len(files.names),
        warnings=(*warnings, *files.warnings),
    )


def _top_level(git: Git, root: Path) -> Path | None:
    try:
        return Path(git.run("rev-parse", "--show-toplevel", cwd=root).rstrip("\n"))
    except GitError as error:
        if "not a git repository" in str(error) or "git is not installed" in str(error):
            return None
        raise


def _is_tracked_or_new(git: Git, root: Path, yaml_path: str) -> bool:
    """False when Git ignores the project altogether, such as a project generated into a build directory."""
    return not git.succeeds("check-ignore", "--quiet", "--", yaml_path, cwd=root)


def _is_clean(git: Git, root: Path) -> bool:
    """Untracked files count only if a package would hold them: not dot files at the root, not `.vhignore`d ones."""
    out = git.run(
        "status",
        "--porcelain",
        "-z",
        "--untracked-files=normal",
        "--no-renames",
        "--",
        ".",
        cwd=root,
    )
    prefix = git.run("rev-parse", "--show-prefix", cwd=root).rstrip("\n")
    ignored = ignore_spec(root)
    for entry in out.split("\0"):
        name = entry[3:].removeprefix(prefix)
        untracked = entry.startswith("??") and name
        if entry and not (untracked and (name.startswith(".") or ignored.match_file(name))):
            return False
    return True


def fetch_source(source: ProjectSource) -> list[FetchedRef]:
    """Bring the mirror of a remote up to date (A-20, A-21); a local directory has nothing to fetch."""
    return mirror_of(source.git).fetch() if source.is_git_url else []


# -- packing -----------------------------------------------------------------------------------------------------


def tree_files(tree: Tree) -> FileList:
    return (
        tracked_files(tree.root, tree.tracked_by) if tree.tracked_by else checkout_files(tree.root)
    )


def pack(root: Path, files: FileList, cache_dir: Path, *, limit: int | None = None) -> Tarball:
    """The tarball of these files, reused while nothing in the list changed."""
    directory = cache_dir / "archives"
    note = directory / f"{files.digest}.json"
    known = _known(note, directory)
    if known is not None:
        return known
    tarball = write_tarball(root, files.names, directory, limit=limit)
    if time.time() - files.newest_mtime_ns / 1e9 > _SETTLED_SECONDS:
        _write_text(note, json.dumps({"sha256": tarball.sha256, "size": tarball.size}))
    _forget_old(directory)
    return tarball


def _known(note: Path, directory: Path) -> Tarball | None:
    try:
        facts = json.loads(note.read_text())
        path = directory / f"{facts['sha256']}.tar.gz"
        if path.stat().st_size != facts["size"]:
            return None
        os.utime(path)
        os.utime(note)
    except (OSError, ValueError, KeyError):
        return None
    return Tarball(path=path, sha256=facts["sha256"], size=facts["size"])


def _write_text(path: Path, text: str) -> None:
    """Processes and threads may write the same note at once."""
    scratch = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


def _forget_old(directory: Path) -> None:
    deadline = time.time() - _KEEP_SECONDS
    for path in directory.iterdir():
        try:
            if path.stat().st_mtime < deadline:
                path.unlink()
        except OSError:  # another process was faster
            continue


def yaml_candidates(root: Path) -> Sequence[str]:
    """YAML files that might be meant when the named one is missing."""
    names = (*root.glob("*valohai*.y*ml"), *root.glob("*/valohai.y*ml"))
    return sorted(str(path.relative_to(root)) for path in names)
