"""The code archive: one deterministic tarball per commit, content-addressed in the code store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from valohai_dagster.errors import StoreConflict
from valohai_dagster.projects.project import Project
from valohai_dagster.projects.source import Commit, Tree, open_tree, pack, tree_files
from valohai_dagster.stores.base import Store


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A finished tarball on this host."""

    project: str
    path: Path
    sha256: str
    size: int
    files: int
    commit: Commit  # of what is really inside, which may be newer than the project that was loaded
    warnings: tuple[
        str, ...
    ] = ()  # large files, skipped links, a directory that changed since it was read


@dataclass(frozen=True, kw_only=True)
class PublishedArchive:
    """Where an archive is, with the field names of `CommitRef`: `CommitRef(**vars(published))`."""

    identifier: str
    ref: str | None
    adhoc: bool
    archive_store: str
    archive_key: str
    archive_sha256: str
    archive_size: int


def build_archive(project: Project) -> Archive:
    """Tarball of the project's commit, built once per content and kept in the cache directory.

    A local directory is looked at again: what runs is what is there now, under its true identifier, with a warning
    when that differs from what was loaded.
    """
    tree, warnings = project.tree, list[str]()
    if tree.commit.adhoc or tree.tracked_by:
        tree = open_tree(project.source, adhoc=tree.commit.adhoc)
        if tree.commit.identifier != project.commit.identifier:
            warnings.append(
                f"the directory changed since the project was loaded: running {tree.commit.identifier} "
                f"instead of {project.commit.identifier}; reload the code location to see changed steps"
            )
    return _packed(project, tree, warnings)


def _packed(project: Project, tree: Tree, warnings: list[str]) -> Archive:
    tarball, count = tree.tarball, tree.files
    warnings = [*warnings, *tree.warnings]
    if tarball is None:
        files = tree_files(tree)
        tarball, count = pack(tree.root, files, project.source.cache_dir), len(files.names)
        warnings += files.warnings
    return Archive(
        project=project.name,
        path=tarball.path,
        sha256=tarball.sha256,
        size=tarball.size,
        files=count,
        commit=tree.commit,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def archive_key(project: str, sha256: str, number: int = 0) -> str:
    """Content-addressed, so that a key is never written with other bytes; `number` makes another one for the same."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", project).strip(".-") or "project"
    return f"commits/{name}/{sha256}{f'-{number}' if number else ''}.tar.gz"


def publish(archive: Archive, store: Store, key: str | None = None) -> PublishedArchive:
    """Upload unless the store has it; who loses a race against the same bytes has published too."""
    key = key or archive_key(archive.project, archive.sha256)
    if store.stat(key) is None:
        try:
            with open(archive.path, "rb") as content:
                store.put(key, content)
        except StoreConflict:
            pass
    return PublishedArchive(
        identifier=archive.commit.identifier,
        ref=archive.commit.ref,
        adhoc=archive.commit.adhoc,
        archive_store=store.name,
        archive_key=key,
        archive_sha256=archive.sha256,
        archive_size=archive.size,
    )
