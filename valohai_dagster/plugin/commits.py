"""The archive of the commit that a launch runs, for a conductor that has no user code.

A code server knows its projects. A conductor may be on another host: it takes what the records know, else what it can
read of the source here.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from valohai_agent.protocol import utcnow
from valohai_dagster.errors import ProjectError, StoreError, ValohaiError
from valohai_dagster.executions.archives import choose_commit, in_code_store, publish_archive
from valohai_dagster.executions.spec_model import CommitRef
from valohai_dagster.plugin.step_tag import StepTag, tag_at
from valohai_dagster.projects.fingerprint import Fingerprint, fingerprint
from valohai_dagster.projects.git import GitAuth, is_git_url
from valohai_dagster.projects.project import Project, load_project

if TYPE_CHECKING:
    from valohai_dagster.executions.spec import StepConfig
    from valohai_dagster.records.engine import Records
    from valohai_dagster.settings import Settings
    from valohai_dagster.stores.registry import Stores

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "VALOHAI_GIT_TOKEN"  # noqa: S105 - the variable's name
SETTLED_NS = 2_000_000_000  # a file changed more recently may change again without a new time
TRUSTED_SECONDS = 60.0  # until a store is asked again whether it still has the archive
KEPT = 256  # commits in memory
PUBLISH_PAUSES = (5.0, 30.0, 120.0)  # seconds between tries of a code server


@dataclass(frozen=True, kw_only=True)
class LaunchCommit:
    """What really runs: the step as that commit has it, and where its archive is."""

    tag: StepTag
    commit: CommitRef
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Built:
    """One published archive of a source that was read here."""

    project: Project
    commit: CommitRef
    warnings: tuple[str, ...]
    mark: Fingerprint | None  # of the directory; None for commits, which never change
    at: float  # monotonic


@dataclass(frozen=True, kw_only=True)
class _Known:
    """One of the records; retention leaves it its archive for longer than it is trusted here."""

    commit: CommitRef
    at: float  # monotonic


@dataclass
class _Cache:
    """Of one process; a commit takes some kilobytes."""

    known: dict[tuple[str, str], _Known] = field(default_factory=dict)
    built: dict[tuple[str, ...], _Built] = field(default_factory=dict)
    locks: dict[tuple[str, ...], threading.Lock] = field(default_factory=dict)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def lock(self, key: tuple[str, ...]) -> threading.Lock:
        """So that a thousand launches of one commit build its archive once."""
        with self.guard:
            return self.locks.setdefault(key, threading.Lock())

    def keep(self, key: tuple[str, ...], built: _Built) -> None:
        with self.guard:
            while len(self.built) >= KEPT:
                del self.built[next(iter(self.built))]
            self.built[key] = built


_CACHES: dict[str, _Cache] = {}  # by deployment and place of its state


def commit_for(
    tag: StepTag, config: StepConfig, *, records: Records, stores: Stores, settings: Settings
) -> LaunchCommit:
    """The commit that this launch runs; raises ProjectError that says what to do. It blocks: Git, files, the store.

    A launch that asks for nothing else runs what its code location loaded. In the embedded default, where the project's
    directory is at hand and people edit it, it runs the directory as it is now, with a warning when that differs.
    """
    if config.commit and config.adhoc:
        raise ProjectError(
            "`commit` and `adhoc` exclude each other: ad-hoc means the directory as it is now"
        )
    cache = _CACHES.setdefault(f"{records.deployment_id} {settings.state_dir}", _Cache())
    loaded = tag.commit
    if config.adhoc or config.commit not in (None, loaded.identifier, loaded.ref):
        built = _from_source(
            tag, config.commit, bool(config.adhoc), cache, records, stores, settings
        )
        return _launched(tag, built)
    as_it_is = settings.redis_url is None and _directory(tag.source) is not None
    known = None if as_it_is else _known(tag, cache, records, stores)
    if known is not None:
        return LaunchCommit(tag=tag, commit=known)
    revision = None if as_it_is or loaded.adhoc else loaded.identifier
    try:
        built = _from_source(tag, revision, False, cache, records, stores, settings)
    except (ProjectError, StoreError, OSError) as error:
        if _directory(tag.source) is not None:
            raise
        raise _absent(tag, error) from error
    return _launched(tag, built, told=True)


def _launched(tag: StepTag, built: _Built, *, told: bool = False) -> LaunchCommit:
    """`told`: another commit than the loaded one is worth a warning, since nobody asked for it."""
    warnings = list(built.warnings)
    same = built.commit.identifier == tag.commit.identifier
    if told and not same:
        warnings.append(
            f"the directory changed since the project was loaded: running {built.commit.identifier} "
            f"instead of {tag.commit.identifier}; reload the code location to see changed steps"
        )
    return LaunchCommit(
        tag=tag if same else tag_at(tag, built.project),
        commit=_named(built.commit, tag) if same else built.commit,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _known(tag: StepTag, cache: _Cache, records: Records, stores: Stores) -> CommitRef | None:
    """From the records; the store is not asked, since retention takes the row first. None too when its archive lies in a
    store of earlier settings and could not be had from there."""
    key = (tag.project_name, tag.commit.identifier)
    known = cache.known.get(key)
    if known is None or time.monotonic() - known.at > TRUSTED_SECONDS:
        found = choose_commit(records, *key, utcnow())
        if found is None or found.archive_store not in stores:
            return None
        try:
            found = in_code_store(
                found, tag.project_name, records=records, stores=stores, now=utcnow()
            )
        except StoreError as error:
            text = "the archive of commit %s stays in the store %s: %s"
            what = (found.identifier, found.archive_store, error)
            log.warning(text, *what, extra={"action": "publish"})
            return None
        known = cache.known[key] = _Known(commit=found, at=time.monotonic())
    return _named(known.commit, tag)


def _named(commit: CommitRef, tag: StepTag) -> CommitRef:
    """By the branch or tag that the code location asked for, which a commit id alone does not tell."""
    return commit.model_copy(update={"ref": tag.commit.ref})


# -- from the source -------------------------------------------------------------------------------------------------


def _from_source(
    tag: StepTag,
    revision: str | None,
    adhoc: bool,
    cache: _Cache,
    records: Records,
    stores: Stores,
    settings: Settings,
) -> _Built:
    key = (tag.source, tag.yaml_path, tag.project_name, revision or "", "adhoc" if adhoc else "")
    with cache.lock(key):
        directory = None if revision else _directory(tag.source)
        mark = fingerprint(directory, without=settings.state_dir) if directory else None
        found = cache.built.get(key)
        if (
            found is not None
            and _is_fresh(found, mark, revision)
            and _is_there(found, tag.project_name, records, stores)
        ):
            return found
        project = load_project(
            tag.source,
            revision=revision,
            yaml_path=tag.yaml_path,
            name=tag.project_name,
            auth=_auth(),
            cache_dir=settings.state_dir / "projects",
            adhoc=adhoc,
        )
        commit, warnings = publish_archive(project, records=records, stores=stores, now=utcnow())
        built = _Built(
            project=project, commit=commit, warnings=warnings, mark=mark, at=time.monotonic()
        )
        if revision == commit.identifier or (
            mark is not None and time.time_ns() - mark.newest_ns > SETTLED_NS
        ):
            cache.keep(key, built)
        return built


def _is_fresh(found: _Built, mark: Fingerprint | None, revision: str | None) -> bool:
    """A full commit id names the same files for ever; a branch or a directory does not."""
    return found.commit.identifier == revision or (mark is not None and found.mark == mark)


def _is_there(found: _Built, project: str, records: Records, stores: Stores) -> bool:
    """In the records, which keeps it from being removed, and in the store."""
    if time.monotonic() - found.at < TRUSTED_SECONDS:
        return True
    commit = found.commit
    known = choose_commit(records, project, commit.identifier, utcnow())
    if known is None:
        return False
    moved = known.archive_store == commit.archive_store and known.archive_key != commit.archive_key
    return not moved and stores[commit.archive_store].stat(commit.archive_key) is not None


def _auth() -> GitAuth | None:
    """Credentials of a project stand in user code; a conductor has those of its environment."""
    token = os.environ.get(TOKEN_VARIABLE)
    return GitAuth(token=token) if token else None


def _directory(source: str) -> Path | None:
    """The working directory that a source names here; a bare repository is none."""
    if is_git_url(source):
        return None
    path = Path(source)
    return path if path.is_dir() and not (path / "objects").is_dir() else None


def _absent(tag: StepTag, error: Exception) -> ProjectError:
    reasons = list(error.problems) if isinstance(error, ProjectError) else []
    headline = error.headline if isinstance(error, ProjectError) else str(error)
    credentials = (
        f"or set {TOKEN_VARIABLE} for the conductor if the repository is private"
        if is_git_url(tag.source)
        else "or run a conductor on a host that has this directory"
    )
    return ProjectError(
        f"commit {tag.commit.identifier} of project `{tag.project_name}` is not in the code store, and its source "
        f"{tag.source} cannot be read on {socket.gethostname()}",
        [
            headline,
            *reasons,
            f"reload the code location, whose process publishes its commit; {credentials}",
            "or launch with the tag `valohai/engine: dagster`: then the run's own process reads the source",
        ],
    )


# -- in a code server --------------------------------------------------------------------------------------------------


def publish_in_background(project: Project, settings: Settings) -> threading.Thread:
    """Makes the commit of a code location known to conductors on other hosts, before anything of it is launched."""
    thread = threading.Thread(
        target=_publish_patiently,
        args=(project, settings),
        name=f"publish {project.name}",
        daemon=True,
    )
    thread.start()
    return thread


def _publish_patiently(
    project: Project, settings: Settings, pauses: Sequence[float] = PUBLISH_PAUSES
) -> None:
    for pause in (*pauses, None):
        try:
            publish_commit(project, settings)
            return
        except (ValohaiError, OSError) as error:
            again = f"trying again in {pause:g} s" if pause is not None else "given up"
            log.warning(
                "commit %s of project %s could not be published for conductors elsewhere, %s: %s",
                project.commit.identifier,
                project.name,
                again,
                error,
                extra={"action": "publish"},
            )
        if pause is not None:
            time.sleep(pause)


def publish_commit(project: Project, settings: Settings) -> CommitRef:
    """Archive into the code store, commit into the records; doing it twice is the same as once."""
    from valohai_dagster.records.engine import open_records
    from valohai_dagster.stores.registry import open_stores

    records = open_records(settings)
    try:
        stores = open_stores(settings)
        commit, _ = publish_archive(project, records=records, stores=stores, now=utcnow())
    finally:
        records.close()
    return commit
