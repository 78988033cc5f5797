"""`load_valohai_project`: the steps of a valohai.yaml project as Dagster assets."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster import AssetExecutionContext

from valohai_dagster.errors import ProjectError
from valohai_dagster.plugin.compat import code_reference
from valohai_dagster.plugin.loaded import (
    BROKEN,
    location_pin,
    pinned_commit,
    remember_loaded,
)
from valohai_dagster.projects.names import legal_name

if (
    TYPE_CHECKING
):  # what reads a project is imported when one is read, so that importing this is cheap
    from valohai_dagster.plugin.backend import Backend
    from valohai_dagster.projects.project import GitAuth, Project
    from valohai_dagster.projects.step import StepDefinition

log = logging.getLogger(__name__)

BROKEN_ASSET = "broken_project"
_PYTHON = re.compile(r"\bpython[0-9.]*\b|\.py\b|\bpip[0-9.]*\b|#!.*python")


def load_valohai_project(
    source: str | Path,
    *,
    revision: str | None = None,
    yaml_path: str = "valohai.yaml",
    name: str | None = None,
    auth: GitAuth | None = None,
    cache_dir: Path | None = None,
    group_name: str | None = None,
    owners: Sequence[str] | None = None,
    tags: Mapping[str, str] | None = None,
    retry_policy: dg.RetryPolicy | None = None,
    strict: bool = False,
    open_backend: Callable[[], Backend] | None = None,
) -> dg.Definitions:
    """Assets `[project, step]` of a local directory, or of a Git URL at a branch, tag or commit.

    A project that cannot be read becomes one asset that tells every problem, so that other projects of the code
    location still load; with `strict` it raises `ProjectError` instead. Combine several with
    `dagster.Definitions.merge`. `group_name`, `owners` and `tags` apply to all assets; without a group, steps are
    grouped by their `category`, else by project. `open_backend` is for tests.
    """
    try:
        project = _load(source, revision, yaml_path, name, auth, cache_dir)
    except ProjectError as error:
        if strict:
            raise
        log.error("%s", error)
        return dg.Definitions(
            assets=[broken_project(name or Path(str(source)).stem, error, group_name)]
        )
    options = {
        "group_name": group_name,
        "owners": owners,
        "tags": tags,
        "retry_policy": retry_policy,
    }
    return dg.Definitions(assets=project_assets(project, open_backend=open_backend, **options))


def _load(
    source: str | Path,
    revision: str | None,
    yaml_path: str,
    name: str | None,
    auth: GitAuth | None,
    cache_dir: Path | None,
) -> Project:
    """Loads the commit that the code server loaded, so that a run sees the same code as the UI."""
    from valohai_dagster.projects.project import load_project

    pin = location_pin(source, yaml_path, revision)
    try:
        project = load_project(
            source,
            revision=pinned_commit(pin) or revision,
            yaml_path=yaml_path,
            name=name,
            auth=auth,
            cache_dir=cache_dir,
        )
    except ProjectError:
        remember_loaded(pin, BROKEN)
        raise
    remember_loaded(pin, project.commit.identifier, for_runs=project.source.is_git_url)
    return project


def project_assets(
    project: Project,
    *,
    group_name: str | None = None,
    owners: Sequence[str] | None = None,
    tags: Mapping[str, str] | None = None,
    retry_policy: dg.RetryPolicy | None = None,
    open_backend: Callable[[], Backend] | None = None,
) -> list[dg.AssetsDefinition]:
    """One asset per step, in the order of the file."""
    from valohai_dagster.plugin import backend

    return [
        step_asset(
            project,
            step,
            open_backend=open_backend or backend.open_backend,
            group_name=group_name
            or legal_name(step.step.category or project.name, fallback="project"),
            owners=owners,
            tags=tags,
            retry_policy=retry_policy,
        )
        for step in project.steps.values()
    ]


def step_asset(
    project: Project,
    step: StepDefinition,
    *,
    open_backend: Callable[[], Backend],
    group_name: str,
    owners: Sequence[str] | None = None,
    tags: Mapping[str, str] | None = None,
    retry_policy: dg.RetryPolicy | None = None,
) -> dg.AssetsDefinition:
    """The asset of one step."""
    from valohai_dagster.plugin.compute import DeployedStep, run_step
    from valohai_dagster.plugin.config_schema import config_schema
    from valohai_dagster.plugin.step_tag import STEP_TAG, step_tag
    from valohai_dagster.plugin.versions import code_version_of

    version = code_version_of(step, project.commit.identifier)
    tag = step_tag(project, step, code_version=version, retry=retry_policy)
    deployed = DeployedStep(project=project, tag=tag, open_backend=open_backend)
    fed = frozenset((edge.target_type, edge.target_key) for edge in tag.edges)

    def _step(context: AssetExecutionContext) -> Iterator[Any]:
        yield from run_step(context, deployed)

    _step.__annotations__["context"] = (
        AssetExecutionContext  # Dagster does not resolve textual ones
    )
    return dg.asset(
        key=dg.AssetKey(tag.asset_key),
        deps=[dg.AssetKey(parent) for parent in tag.parents],
        description=description_of(project, step),
        metadata=definition_metadata(project, step),
        group_name=group_name,
        kinds=kinds_of(step),
        owners=list(owners) if owners else None,
        tags=dict(tags) if tags else None,
        code_version=version,
        config_schema=config_schema(step, fed=fed),
        op_tags={STEP_TAG: tag.to_text()},
        retry_policy=retry_policy,
    )(_step)


def kinds_of(step: StepDefinition) -> set[str]:
    text = "\n".join(step.step.command or [])
    return {"docker", "python"} if _PYTHON.search(text) else {"docker"}


def description_of(project: Project, step: StepDefinition) -> str:
    """The step's own words, then what of it has no effect here (nothing is ignored silently)."""
    parts = [step.step.description.strip()] if step.step.description else []
    parts.append(f"Step `{step.name}` of project `{project.name}`, image `{step.step.image}`.")
    outputs = [_output_line(output) for output in step.step.outputs]
    parts += [
        f"**{title}:**\n" + "\n".join(f"- {line}" for line in lines)
        for title, lines in (
            ("Outputs", outputs),
            ("Not supported here", step.unsupported),
            ("Notes on the project's YAML", step.notes),
        )
        if lines
    ]
    return "\n\n".join(parts)


def _output_line(output: Mapping[str, Any]) -> str:
    """Declared outputs are informational: every file in the outputs directory is collected (Y-13)."""
    description = output.get("description")
    return f"`{output.get('name')}`" + (f": {description}" if description else "")


def definition_metadata(project: Project, step: StepDefinition) -> dict[str, Any]:
    commit = project.commit
    metadata: dict[str, Any] = {
        "project": project.name,
        "step": step.name,
        "commit": commit.identifier,
        "image": step.step.image,
        "source": project.source.location,
    }
    if commit.ref:
        metadata["ref"] = commit.ref
    if not project.source.is_git_url:
        path = project.root / project.source.yaml_path
        metadata["dagster/code_references"] = code_reference(str(path), step.line)
    return metadata


def broken_project(
    name: str, error: ProjectError, group_name: str | None = None
) -> dg.AssetsDefinition:
    """A placeholder that shows why the project is not there; running it fails with the same words."""
    problems = "\n".join(f"- {problem}" for problem in error.problems)
    legal = legal_name(name, fallback="project")

    @dg.asset(
        key=[legal, BROKEN_ASSET],
        group_name=group_name or legal,
        description=f"**{error.headline}**\n\n{problems}\n\nFix it and reload the code location.",
        metadata={"problems": dg.MetadataValue.md(problems or error.headline)},
    )
    def _broken() -> None:
        raise dg.Failure(description=str(error), allow_retries=False)

    return _broken
