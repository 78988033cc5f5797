"""valohai.yaml projects as Dagster assets, run on worker machines.

    import dagster as dg
    from valohai_dagster import load_valohai_project

    defs = load_valohai_project("path/to/project")

Every name below is loaded when it is first used, so importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from valohai_dagster.version import __version__

if TYPE_CHECKING:
    from valohai_dagster.errors import ProjectError, SpecError, ValohaiError
    from valohai_dagster.plugin.assets import load_valohai_project, project_assets
    from valohai_dagster.plugin.autoscaling import valohai_autoscaling_sensor
    from valohai_dagster.plugin.checks import MetricCheck
    from valohai_dagster.plugin.component import ValohaiProjectComponent
    from valohai_dagster.plugin.compute_logs import ValohaiComputeLogManager
    from valohai_dagster.plugin.git_sensor import build_git_sensor
    from valohai_dagster.plugin.jobs import valohai_job
    from valohai_dagster.plugin.launcher import ValohaiRunLauncher
    from valohai_dagster.plugin.observe_sensor import build_observe_sensor
    from valohai_dagster.plugin.resources import ValohaiResource
    from valohai_dagster.plugin.retention import build_retention_sensor
    from valohai_dagster.plugin.store_resources import StoreResource, store_resources
    from valohai_dagster.projects.project import GitAuth, Project, load_project
    from valohai_dagster.settings import Settings, load_settings

_HOME = {
    "GitAuth": "projects.project",
    "MetricCheck": "plugin.checks",
    "Project": "projects.project",
    "ProjectError": "errors",
    "Settings": "settings",
    "SpecError": "errors",
    "StoreResource": "plugin.store_resources",
    "ValohaiComputeLogManager": "plugin.compute_logs",
    "ValohaiError": "errors",
    "ValohaiProjectComponent": "plugin.component",
    "ValohaiResource": "plugin.resources",
    "ValohaiRunLauncher": "plugin.launcher",
    "build_git_sensor": "plugin.git_sensor",
    "build_observe_sensor": "plugin.observe_sensor",
    "build_retention_sensor": "plugin.retention",
    "load_project": "projects.project",
    "load_settings": "settings",
    "load_valohai_project": "plugin.assets",
    "project_assets": "plugin.assets",
    "store_resources": "plugin.store_resources",
    "valohai_autoscaling_sensor": "plugin.autoscaling",
    "valohai_job": "plugin.jobs",
}

__all__ = [
    "GitAuth",
    "MetricCheck",
    "Project",
    "ProjectError",
    "Settings",
    "SpecError",
    "StoreResource",
    "ValohaiComputeLogManager",
    "ValohaiError",
    "ValohaiProjectComponent",
    "ValohaiResource",
    "ValohaiRunLauncher",
    "__version__",
    "build_git_sensor",
    "build_observe_sensor",
    "build_retention_sensor",
    "load_project",
    "load_settings",
    "load_valohai_project",
    "project_assets",
    "store_resources",
    "valohai_autoscaling_sensor",
    "valohai_job",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
