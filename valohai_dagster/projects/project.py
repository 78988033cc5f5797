"""`Project`: one commit of a valohai.yaml project, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from valohai_yaml.objs import Pipeline

from valohai_dagster.projects.edges import StepEdge
from valohai_dagster.projects.problems import Problem
from valohai_dagster.projects.step import StepDefinition


@dataclass(frozen=True, kw_only=True)
class GitAuth:
    """How to reach a private repository. Secrets never appear in argv, git config, logs or reprs."""

    token: str | None = field(default=None, repr=False)
    username: str = "git"  # sent with the token; most hosts take any name
    ssh_key: Path | str | None = field(default=None, repr=False)  # a path, or the key's text
    known_hosts: Path | None = (
        None  # None: trust a host on first use, remembered in the cache directory
    )


@dataclass(frozen=True, kw_only=True)
class ProjectSource:
    """Where a project comes from; enough to read another commit of it."""

    location: str  # absolute directory, or Git URL without credentials
    is_git_url: bool
    yaml_path: str = "valohai.yaml"
    name: str = ""
    auth: GitAuth | None = field(default=None, repr=False)
    cache_dir: Path = Path(".valohai/projects")


@dataclass(frozen=True, kw_only=True)
class Commit:
    """T-02. `identifier` is the Git SHA, or `~` and the tarball's sha256 when uncommitted (T-03)."""

    identifier: str
    ref: str | None = None  # branch or tag asked for, the current branch, or `adhoc`
    adhoc: bool = False


@dataclass(frozen=True, kw_only=True)
class Project:
    """Everything that the asset graph needs to know about one commit."""

    name: str
    root: Path  # directory of the commit's tree
    source: ProjectSource
    commit: Commit
    asset_name: str  # `name` as a legal Dagster name: first part of the asset keys
    steps: Mapping[str, StepDefinition]  # by the steps' own names, in file order
    edges: tuple[StepEdge, ...] = ()
    pipelines: Mapping[str, Pipeline] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()  # warnings and notes; errors raise ProjectError


def load_project(
    source: str | Path,
    *,
    revision: str | None = None,
    yaml_path: str = "valohai.yaml",
    name: str | None = None,
    auth: GitAuth | None = None,
    cache_dir: Path | None = None,
    fetch: bool = False,
) -> Project:
    """Read a project from a local directory or a Git URL; raise ProjectError with every problem found.

    A local directory is its HEAD commit when it is clean under Git, else ad-hoc. A Git URL is cloned the first time;
    afterwards the known commits are used without the network unless `fetch` (A-20), so that every process
    of a deployment sees the same commit.
    """
    raise NotImplementedError


def project_at(project: Project, *, commit: str | None = None, adhoc: bool = False) -> Project:
    """The same project at another commit, or its directory as it is now (`adhoc`); steps are read anew (Y-17)."""
    raise NotImplementedError
