"""A Git repository on this host, usually a mirror of a remote, and the trees of its commits.

The mirror is fetched on demand only (A-20). Each commit's tree is checked out once and never changes afterwards.
Processes that share the cache directory take turns by a file lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from valohai_dagster.errors import ProjectError
from valohai_dagster.projects.git import Git, GitError


@dataclass(frozen=True, kw_only=True)
class FetchedRef:
    """A branch or tag that a fetch brought or moved (A-21)."""

    ref: str
    identifier: str


@dataclass(frozen=True, kw_only=True)
class Repository:
    """`directory` is the git directory; `home` holds checkouts and the lock."""

    git: Git
    directory: Path
    home: Path

    @property
    def url(self) -> str:
        return self.git.url

    def exists(self) -> bool:
        return (self.directory / "HEAD").exists() or (self.directory / ".git").exists()

    @contextmanager
    def lock(self) -> Iterator[None]:
        self.home.mkdir(parents=True, exist_ok=True)
        with open(self.home / "lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # -- refs ----------------------------------------------------------------------------------------------------

    def resolve(self, revision: str | None) -> tuple[str, str | None] | None:
        """(SHA, ref) of a branch, a tag or a SHA of at least 7 digits; None when unknown here.

        A branch beats a tag of the same name; None asks for the default branch.
        """
        if revision is None or revision == "HEAD":
            sha = self._commit("HEAD")
            return (sha, self.default_branch()) if sha else None
        for prefix in ("refs/heads/", "refs/tags/"):
            sha = self._commit(prefix + revision)
            if sha:
                return sha, revision
        if re.fullmatch(r"[0-9a-fA-F]{7,64}", revision):
            sha = self._commit(revision)
            return (sha, None) if sha else None
        return None

    def default_branch(self) -> str | None:
        try:
            name = self.git.run("symbolic-ref", "--quiet", "HEAD", cwd=self.directory)
        except GitError:  # detached
            return None
        return name.strip().removeprefix("refs/heads/")

    def refs(self) -> dict[str, str]:
        """Branches and tags with the SHA that they point at."""
        out = self.git.run("for-each-ref", "--format=%(objectname) %(refname)", cwd=self.directory)
        pairs = (line.split(" ", 1) for line in out.splitlines())
        return {name: sha for sha, name in pairs}

    def _commit(self, name: str) -> str | None:
        try:
            out = self.git.run(
                "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", cwd=self.directory
            )
        except GitError:
            return None
        return out.strip() or None

    # -- network -------------------------------------------------------------------------------------------------

    def fetch(self) -> list[FetchedRef]:
        """Bring branches and tags up to date; what was new. Commits once seen stay available."""
        with self.lock():
            if not self.exists():
                self._create()
            before = self.refs()
            self._fetch_refs()
            self._follow_default_branch()
            after = self.refs()
        return [
            FetchedRef(ref=re.sub("^refs/(heads|tags)/", "", ref), identifier=sha)
            for ref, sha in after.items()
            if before.get(ref) != sha
        ]

    def fetch_commit(self, sha: str) -> None:
        """A commit that no branch or tag reaches; hosts may refuse."""
        with self.lock():
            self._network(
                "fetch", "--quiet", "--no-tags", self.url, sha.lower(), what=f"fetching {sha} from"
            )

    def _create(self) -> None:
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self.git.run("init", "--quiet", "--bare", str(self.directory), cwd=self.home)

    def _fetch_refs(self) -> None:
        refspecs = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")
        self._network(
            "fetch", "--quiet", "--prune", "--force", self.url, *refspecs, what="fetching"
        )

    def _follow_default_branch(self) -> None:
        out = self._network("ls-remote", "--symref", self.url, "HEAD", what="reading")
        match = re.match(r"ref: (refs/heads/\S+)\tHEAD", out)
        if match:
            self.git.run("symbolic-ref", "HEAD", match[1], cwd=self.directory)

    def _network(self, *arguments: str, what: str) -> str:
        return self.git.run(*arguments, cwd=self.directory, network=True, what=what)

    # -- trees ---------------------------------------------------------------------------------------------------

    def checkout(self, sha: str) -> Path:
        """Directory with the commit's tree, submodules included."""
        final = self.home / "commits" / sha
        if final.is_dir():
            return final
        with self.lock():
            if not final.is_dir():
                self._checkout(sha, final)
        return final

    def _checkout(self, sha: str, final: Path) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="new-", dir=final.parent))
        tree = scratch / "tree"
        try:
            source = str(self.directory.absolute())
            self.git.run(
                "clone",
                "--quiet",
                "--shared",
                "--no-checkout",
                "--no-tags",
                source,
                str(tree),
                cwd=scratch,
            )
            self.git.run(
                "checkout", "--quiet", "--detach", sha, cwd=tree, what=f"checking out {sha} of"
            )
            if (tree / ".gitmodules").is_file():
                self._update_submodules(tree)
            os.replace(tree, final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _update_submodules(self, tree: Path) -> None:
        """Relative addresses of submodules count from the project's own (not from the mirror's directory)."""
        self.git.run("remote", "set-url", "origin", self.url, cwd=tree)
        self.git.run(
            "submodule", "--quiet", "update", "--init", "--recursive", cwd=tree, network=True, what="reading submodules of"
        )  # fmt: skip


def mirror_of(git: Git) -> Repository:
    """The cached mirror of `git.url`; not created yet."""
    home = _home(git)
    return Repository(git=git, directory=home / "mirror.git", home=home)


def local_repository(directory: Path, cache_dir: Path) -> Repository:
    """A user's own repository: read where it is, never fetched or changed."""
    git = Git(url=str(directory), cache_dir=cache_dir)
    return Repository(git=git, directory=directory, home=_home(git))


def _home(git: Git) -> Path:
    name = re.sub(
        r"[^A-Za-z0-9_.-]+", "-", git.url.rstrip("/").removesuffix(".git").rsplit("/", 1)[-1]
    )[-40:]
    digest = hashlib.sha256(git.url.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return git.cache_dir.absolute() / "repositories" / f"{name.lstrip('.-')}-{digest}"


def find_commit(
    repository: Repository, revision: str | None, *, fetch: bool
) -> tuple[str, str | None]:
    """(SHA, ref), from what is known here unless `fetch` or unknown; ProjectError names what there is."""
    _check_revision(revision)
    fetched = fetch or not repository.exists()
    if fetched:
        repository.fetch()
    found = repository.resolve(revision)
    if found is None and not fetched:
        repository.fetch()
        found = repository.resolve(revision)
    if found is None and revision and re.fullmatch(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}", revision):
        try:
            repository.fetch_commit(revision)
        except GitError as error:
            raise not_found(repository, revision) from error
        found = repository.resolve(revision)
    if found is None:
        raise not_found(repository, revision)
    return found


def _check_revision(revision: str | None) -> None:
    if revision is None:
        return
    if revision.startswith("library:"):
        raise ProjectError(f"commit `{revision}`: step libraries are not supported (T-28)")
    if revision.startswith("~"):
        raise ProjectError(
            f"commit `{revision}` is ad-hoc: only the directory as it is now can be run ad-hoc"
        )
    if not revision or revision.startswith("-") or re.search(r"[\s\x00-\x1f~^:?*\[\\]", revision):
        raise ProjectError(f"{revision!r} is no branch, tag or commit")


def not_found(repository: Repository, revision: str | None) -> ProjectError:
    """What exists instead."""
    refs = [re.sub("^refs/(heads|tags)/", "", ref) for ref in repository.refs()]
    if not refs:
        return ProjectError(f"{repository.url} has no commits yet: push one, then fetch")
    shown = ", ".join(f"`{ref}`" for ref in refs[:20]) + (" ..." if len(refs) > 20 else "")
    name = f"branch, tag or commit `{revision}`" if revision else "default branch"
    return ProjectError(f"{repository.url} has no {name}", [f"it has {shown}"])
