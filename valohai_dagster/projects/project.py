"""`Project`: one commit of a valohai.yaml project, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from valohai_dagster.errors import ProjectError
from valohai_dagster.projects.git import GitAuth
from valohai_dagster.projects.names import legal_name, legal_names
from valohai_dagster.projects.problems import Problem
from valohai_dagster.projects.repository import FetchedRef
from valohai_dagster.projects.source import (
    Commit,
    ProjectSource,
    Tree,
    fetch_source,
    make_source,
    open_tree,
    yaml_candidates,
)
from valohai_dagster.projects.step import StepDefinition

if TYPE_CHECKING:  # the YAML library is imported when a file is read
    from valohai_yaml.objs import Config, Pipeline

    from valohai_dagster.projects.edges import StepEdge
    from valohai_dagster.projects.lint import CheckedConfig

__all__ = [
    "Commit",
    "FetchedRef",
    "GitAuth",
    "Project",
    "ProjectSource",
    "fetch_project",
    "load_project",
    "project_at",
]


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
    tree: Tree = field(kw_only=True, repr=False, compare=False)

    def step(self, name: str) -> StepDefinition:
        """By the step's own name or its asset name; ProjectError lists what there is."""
        for step in self.steps.values():
            if name in (step.name, step.asset_name):
                return step
        known = ", ".join(f"`{other}`" for other in self.steps) or "none"
        commit = self.commit.identifier
        raise ProjectError(
            f"project `{self.name}` has no step `{name}` at commit {commit}: it has {known}"
        )


def load_project(
    source: str | Path,
    *,
    revision: str | None = None,
    yaml_path: str = "valohai.yaml",
    name: str | None = None,
    auth: GitAuth | None = None,
    cache_dir: Path | None = None,
    fetch: bool = False,
    adhoc: bool = False,
) -> Project:
    """Read a project from a local directory or a Git URL; raise ProjectError with every problem found.

    A local directory is its HEAD commit when it is clean under Git, else ad-hoc. A Git URL is cloned the first time;
    afterwards the known commits are used without the network unless `fetch` (A-20), so that every process
    of a deployment sees the same commit. `adhoc` takes a directory as it is even when it is clean. Without `cache_dir` clones and archives go below the configured state
    directory.
    """
    where = make_source(
        source,
        yaml_path=yaml_path,
        name=name,
        auth=auth,
        cache_dir=cache_dir or _default_cache(),
    )
    return _load(where, open_tree(where, revision, fetch=fetch, adhoc=adhoc))


def project_at(project: Project, *, commit: str | None = None, adhoc: bool = False) -> Project:
    """The same project at another commit, or its directory as it is now (`adhoc`); steps are read anew (Y-17)."""
    if commit and adhoc:
        raise ProjectError(
            "`commit` and `adhoc` exclude each other: ad-hoc means the directory as it is now"
        )
    if not commit and not adhoc:
        return project
    if commit in (project.commit.identifier, project.commit.ref) and not project.commit.adhoc:
        return project
    return _load(project.source, open_tree(project.source, commit or None, adhoc=adhoc))


def fetch_project(project: Project | ProjectSource) -> list[FetchedRef]:
    """Fetch a remote's new commits; load the project again to use them. Empty for local directories."""
    return fetch_source(project.source if isinstance(project, Project) else project)


def _default_cache() -> Path:
    from valohai_dagster.settings import load_settings  # only where nobody chose a place

    return load_settings().state_dir / "projects"


def _load(source: ProjectSource, tree: Tree) -> Project:
    from valohai_dagster.projects.lint import check_config

    checked = check_config(_read_yaml(source, tree))
    if checked.config is None:
        commit = tree.commit.identifier[:12]
        raise ProjectError(
            f"project `{source.name}`: {source.yaml_path} of {commit} has {_counted(checked.problems)}:",
            [_told(problem) for problem in checked.problems if problem.level != "note"],
        )
    return _project(source, tree, checked.config, checked)


def _counted(problems: Sequence[Problem]) -> str:
    """The levels that `_told` lists, each with its number."""
    counts = {
        level: sum(problem.level == level for problem in problems) for level in ("error", "warning")
    }
    words = [f"{count} {level}{'s' * (count > 1)}" for level, count in counts.items() if count]
    return " and ".join(words)


def _told(problem: Problem) -> str:
    return str(problem) if problem.level == "error" else f"{problem.level}: {problem}"


def _project(source: ProjectSource, tree: Tree, config: Config, checked: CheckedConfig) -> Project:
    from valohai_dagster.projects.edges import derive_edges

    task_steps = {name: task.step for name, task in config.tasks.items()}
    edges, notes = derive_edges(config.steps, config.pipelines, task_steps)
    legal = legal_names(config.steps)
    unsupported = set(checked.unsupported)
    problems = (*checked.problems, *notes, *_warnings(tree.warnings))
    others = [problem for problem in problems if problem not in unsupported]
    steps = {
        name: StepDefinition(
            project=source.name,
            step=step,
            asset_name=legal[name],
            line=checked.step_lines.get(name),
            unsupported=_concerning(name, checked.unsupported),
            notes=_concerning(name, others),
        )
        for name, step in config.steps.items()
    }
    return Project(
        name=source.name,
        root=tree.root,
        source=source,
        commit=tree.commit,
        asset_name=legal_name(source.name, fallback="project"),
        steps=steps,
        edges=edges,
        pipelines=config.pipelines,
        problems=problems,
        tree=tree,
    )


def _concerning(step: str, problems: Sequence[Problem]) -> tuple[str, ...]:
    return tuple(str(problem) for problem in problems if problem.concerns(step))


def _warnings(messages: Sequence[str]) -> list[Problem]:
    return [Problem(level="warning", message=message) for message in messages]


def _read_yaml(source: ProjectSource, tree: Tree) -> bytes:
    path = tree.root / source.yaml_path
    if not path.resolve().is_relative_to(tree.root.resolve()):
        raise ProjectError(f"project `{source.name}`: {source.yaml_path} links out of the project")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        others = yaml_candidates(tree.root)
        hint = (
            f"is it one of {', '.join(others)}? Set yaml_path"
            if others
            else "add one, or set yaml_path"
        )
        raise ProjectError(
            f"project `{source.name}` has no {source.yaml_path} in {source.location} at {tree.commit.identifier[:12]}",
            [hint],
        ) from None
    except OSError as error:
        raise ProjectError(
            f"project `{source.name}`: cannot read {path}: {error.strerror}"
        ) from error
