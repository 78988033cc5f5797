"""A sensor that reloads the code location when a project has a new commit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster import SensorEvaluationContext, SensorResult, SkipReason

from valohai_dagster.errors import ProjectError, ValohaiError
from valohai_dagster.plugin.loaded import loaded_commit, location_pin
from valohai_dagster.plugin.reload import reload_code_location
from valohai_dagster.projects.names import legal_name

if TYPE_CHECKING:
    from valohai_dagster.projects.project import GitAuth, Project

Reload = Callable[[str], None]


def build_git_sensor(
    source: str | Path,
    *,
    revision: str | None = None,
    yaml_path: str = "valohai.yaml",
    name: str | None = None,
    auth: GitAuth | None = None,
    cache_dir: Path | None = None,
    location_name: str | None = None,
    minimum_interval_seconds: int = 60,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.STOPPED,
    reload: Reload | None = None,
) -> dg.SensorDefinition:
    """Fetches the project's remote, or looks at its directory, and reloads the code location on a new commit.

    The webserver is the one of the setting `webserver_url`; `location_name` is the code location to reload, by
    default the one that holds the sensor. A broken commit is told in the tick and does not reload, so the last good one stays.
    """
    title = legal_name(
        name or Path(str(source).rstrip("/")).name.removesuffix(".git"), fallback="project"
    )

    def load() -> Project:
        from valohai_dagster.projects.project import load_project

        return load_project(
            source,
            revision=revision,
            yaml_path=yaml_path,
            name=name,
            auth=auth,
            cache_dir=cache_dir,
            fetch=True,
        )

    def evaluate(context: SensorEvaluationContext) -> SensorResult | SkipReason:
        loaded = loaded_commit(location_pin(source, yaml_path, revision))
        return look_for_commit(context, load, reload or _reload_at(context, location_name), loaded)

    evaluate.__annotations__.clear()  # Dagster does not resolve textual ones
    return dg.SensorDefinition(
        name=f"{title}_new_commits",
        evaluation_fn=evaluate,
        minimum_interval_seconds=minimum_interval_seconds,
        description=f"Reloads this code location when {source} has a new commit.",
        default_status=default_status,
        asset_selection=None,
    )


def look_for_commit(
    context: SensorEvaluationContext,
    load: Callable[[], Project],
    reload: Reload,
    loaded: str | None = None,
) -> SensorResult | SkipReason:
    """One tick. The cursor is the commit that was last reloaded, and moves only once that worked.

    `loaded` is the commit that the code location serves, None if that is not known: what differs from it is new even
    at the first tick, and what it serves already needs no reload.
    """
    try:
        project = load()
    except ProjectError as error:
        return SkipReason(f"the newest commit cannot be used, so nothing was reloaded: {error}")
    commit = project.commit.identifier
    if commit == context.cursor:
        return SkipReason(f"{project.name} is still at {commit[:13]}")
    if commit == loaded or (context.cursor is None and loaded is None):
        context.update_cursor(commit)
        return SkipReason(f"{project.name} is at {commit[:13]}; watching from here on")
    try:
        reload(project.name)
    except ValohaiError as error:
        return SkipReason(f"{project.name} has the new commit {commit[:13]}, but: {error}")
    context.update_cursor(commit)
    return SkipReason(f"{project.name} has the new commit {commit[:13]}: code location reloaded")


def _reload_at(context: SensorEvaluationContext, location_name: str | None) -> Reload:
    def reload(project: str) -> None:
        from valohai_dagster.settings import load_settings

        settings: Any = load_settings()
        reload_code_location(settings.webserver_address, location_name or _location_of(context))

    return reload


def _location_of(context: SensorEvaluationContext) -> str:
    origin = context.code_location_origin
    return origin.location_name if origin is not None else "definitions"
