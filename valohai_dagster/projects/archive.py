"""The code archive: one deterministic tarball per commit, content-addressed in the code store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from valohai_dagster.projects.project import Project
from valohai_dagster.stores.base import Store


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A finished tarball on this host."""

    project: str
    path: Path
    sha256: str
    size: int
    files: int
    identifier: str  # commit identifier of what is really inside: git SHA, or ~sha256 (T-03)
    ref: str | None
    adhoc: bool
    warnings: tuple[str, ...] = ()  # large files, skipped links (S-32)


@dataclass(frozen=True, kw_only=True)
class PublishedArchive:
    """What `CommitRef` needs: `CommitRef(**vars)` plus nothing."""

    identifier: str
    ref: str | None
    adhoc: bool
    archive_store: str
    archive_key: str
    archive_sha256: str
    archive_size: int


def build_archive(project: Project) -> Archive:
    """Tarball of the project's commit, built once per content and kept in the cache directory."""
    raise NotImplementedError


def publish(archive: Archive, store: Store) -> PublishedArchive:
    """Upload under `commits/<project>/<sha256>.tar.gz` unless it is there already."""
    raise NotImplementedError
