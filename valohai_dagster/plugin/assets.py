"""`load_valohai_project`: the steps of a valohai.yaml project as Dagster assets."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster import AssetExecutionContext
from typing_extensions import Unpack

from valohai_dagster.errors import ConfigurationError, ProjectError
from valohai_dagster.plugin.compat import code_reference, is_first_load
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
    from valohai_dagster.plugin.checks import MetricCheck
    from valohai_dagster.plugin.step_options import Declarations, PerStep, StepOptions
    from valohai_dagster.plugin.step_tag import StepTag, TaggedSource
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
    partitions_def: PerStep[dg.PartitionsDefinition[Any]] = None,
    partition_parameter: PerStep[str] = None,
    partition_mappings: Mapping[str, Mapping[str, dg.PartitionMapping]] | None = None,
    backfill_policy: PerStep[dg.BackfillPolicy] = None,
    checks: Mapping[str, Sequence[MetricCheck]] | None = None,
    retry_policy: PerStep[dg.RetryPolicy] = None,
    pool: PerStep[str] = None,
    upload_store: PerStep[str] = None,
    external_assets: bool = True,
    strict: bool = False,
    open_backend: Callable[[], Backend] | None = None,
) -> dg.Definitions:
    """Assets `[project, step]` of a local directory, or of a Git URL at a branch, tag or commit.

    A project that cannot be read becomes one asset that tells every problem, so that other projects of the code
    location still load; with `strict` it raises `ProjectError` instead. Combine several with
    `dagster.Definitions.merge`. `group_name`, `owners` and `tags` apply to all assets; without a group, steps are
    grouped by their `category`, else by project. `open_backend` is for tests.

    The other options are what valohai.yaml has no words for. Each is one value for all
    steps, or a mapping by step name in which `*` stands for the rest:

    - `partitions_def`: partitions of the asset; `backfill_policy`: whether a range of them is one execution.
    - `partition_parameter`: the step's parameter that gets the partition key. As one name for all, it counts for
      the partitioned steps that declare it. VH_PARTITION_KEY has the key in any case.
    - `partition_mappings`: by step and its upstream step, where Dagster's default mapping is not what is meant.
    - `checks`: asset checks by step, see `MetricCheck`.
    - `retry_policy` for failed executions, and the `pool` that limits how many run at once.
    - `upload_store`: where outputs go of steps without an `upload-store` of their own, unless the launch chooses.

    Default URIs of inputs that lie outside (a bucket, a web server, a datum alias) become observable assets that the
    steps depend on, unless `external_assets` is False.
    """
    declared: Declarations = {
        "partitions_def": partitions_def,
        "partition_parameter": partition_parameter,
        "partition_mappings": partition_mappings,
        "backfill_policy": backfill_policy,
        "checks": checks,
        "retry_policy": retry_policy,
        "pool": pool,
        "upload_store": upload_store,
    }
    try:
        project = _load(source, revision, yaml_path, name, auth, cache_dir)
        _tell_conductors(project)
        assets = project_assets(
            project,
            group_name=group_name,
            owners=owners,
            tags=tags,
            open_backend=open_backend,
            external_assets=external_assets,
            **declared,
        )
    except ProjectError as error:
        if strict:
            raise
        log.error("%s", error, extra={"action": "load-project"})
        return dg.Definitions(
            assets=[broken_project(name or Path(str(source)).stem, error, group_name)]
        )
    return dg.Definitions(assets=assets)


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


def _tell_conductors(project: Project) -> None:
    """A conductor of a shared deployment may be on a host that cannot read the project: it needs the archive."""
    if not is_first_load():
        return
    from valohai_dagster.settings import load_settings

    try:
        settings = load_settings()
    except ConfigurationError as error:
        text = "the commit of project %s is not published: %s"
        log.warning(text, project.name, error, extra={"action": "publish"})
        return
    if settings.redis_url:
        from valohai_dagster.plugin.commits import publish_in_background

        publish_in_background(project, settings)


def project_assets(
    project: Project,
    *,
    group_name: str | None = None,
    owners: Sequence[str] | None = None,
    tags: Mapping[str, str] | None = None,
    open_backend: Callable[[], Backend] | None = None,
    external_assets: bool = False,
    **declared: Unpack[Declarations],
) -> list[dg.AssetsDefinition]:
    """One asset per step, in the order of the file, then what they read from outside; see `load_valohai_project`."""
    from valohai_dagster.data.external import external_sources
    from valohai_dagster.plugin import backend
    from valohai_dagster.plugin.external import observable, sources_of
    from valohai_dagster.plugin.step_options import options_by_step

    options = options_by_step(project, declared)
    sources = []
    if external_assets:
        sources = external_sources(project.asset_name, project.steps, project.edges)
    steps = [
        step_asset(
            project,
            step,
            options=options[step.name],
            open_backend=open_backend or backend.open_backend,
            group_name=group_name
            or legal_name(step.step.category or project.name, fallback="project"),
            owners=owners,
            tags=tags,
            sources=sources_of(step.name, sources),
        )
        for step in project.steps.values()
    ]
    if not sources:
        return steps
    group = group_name or legal_name(project.name, fallback="project")
    return [*steps, observable(project, sources, group_name=group, owners=owners, tags=tags)]


def step_asset(
    project: Project,
    step: StepDefinition,
    *,
    options: StepOptions,
    open_backend: Callable[[], Backend],
    group_name: str,
    owners: Sequence[str] | None = None,
    tags: Mapping[str, str] | None = None,
    sources: Sequence[TaggedSource] = (),
) -> dg.AssetsDefinition:
    """The asset of one step; `sources` are those outside that feed it."""
    from valohai_dagster.plugin.checks import check_spec
    from valohai_dagster.plugin.compute import DeployedStep, run_step
    from valohai_dagster.plugin.config_schema import config_schema
    from valohai_dagster.plugin.step_tag import STEP_TAG, step_tag
    from valohai_dagster.plugin.versions import code_version_of

    version = code_version_of(step, project.commit.identifier)
    tag = step_tag(
        project,
        step,
        code_version=version,
        retry=options.retry_policy,
        checks=options.checks,
        partition_parameter=options.partition_parameter,
        sources=sources,
        upload_store=options.upload_store,
    )
    deployed = DeployedStep(project=project, tag=tag, open_backend=open_backend)
    key = dg.AssetKey(tag.asset_key)

    def _step(context: AssetExecutionContext) -> Iterator[Any]:
        yield from run_step(context, deployed)

    _step.__annotations__["context"] = (
        AssetExecutionContext  # Dagster does not resolve textual ones
    )
    return dg.asset(
        key=key,
        deps=_deps(tag, options),
        description=description_of(project, step),
        metadata=definition_metadata(project, step),
        group_name=group_name,
        kinds=kinds_of(step),
        owners=list(owners) if owners else None,
        tags=dict(tags) if tags else None,
        code_version=version,
        config_schema=config_schema(
            step,
            fed=frozenset((edge.target_type, edge.target_key) for edge in tag.edges),
            partition_parameter=options.partition_parameter,
            upload_store=options.upload_store,
        ),
        op_tags={STEP_TAG: tag.to_text()},
        retry_policy=options.retry_policy,
        partitions_def=options.partitions_def,
        backfill_policy=options.backfill_policy,
        check_specs=[check_spec(check, key) for check in options.checks] or None,
        pool=options.pool,
    )(_step)


def _deps(tag: StepTag, options: StepOptions) -> list[dg.AssetDep]:
    mappings = options.partition_mappings or {}
    steps = [
        dg.AssetDep(dg.AssetKey(path), partition_mapping=mappings.get(source))
        for source, path in tag.upstream.items()
    ]
    outside = dict.fromkeys(source.key for source in tag.sources)
    return [*steps, *(dg.AssetDep(dg.AssetKey(path)) for path in outside)]


def kinds_of(step: StepDefinition) -> set[str]:
    """What runs it, as far as that is the same wherever it runs: the worker's runtime need not be Docker."""
    command = step.step.command or []
    text = command if isinstance(command, str) else "\n".join(command)
    return {"valohai", "python"} if _PYTHON.search(text) else {"valohai"}


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
