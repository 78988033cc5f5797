"""The package's front door: what it offers, and that looking at it is cheap."""

from __future__ import annotations

import subprocess
import sys

import valohai_dagster

NAMES = [
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
HEAVY = {
    "alembic",
    "docker",
    "httpx",
    "jsonschema",
    "kubernetes",
    "nacl",
    "pathspec",
    "redis",
    "rich",
    "sklearn",
    "sqlalchemy",
    "starlette",
    "typer",
    "uvicorn",
    "valohai_yaml",
    "virtualenv",
}


def test_the_public_names_are_these() -> None:
    assert valohai_dagster.__all__ == NAMES
    for name in NAMES:
        assert getattr(valohai_dagster, name) is not None


def modules_after(statement: str) -> set[str]:
    code = f"import dagster, sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_next_to_nothing() -> None:
    """Stands for "within 150 ms of importing dagster", counted instead of timed."""
    added = modules_after("import valohai_dagster")
    assert len(added) <= 5, sorted(added)


def test_importing_every_public_name_imports_no_client_no_server_and_no_yaml_library() -> None:
    """What reads projects, talks to services or serves is imported when it is first used."""
    names = ", ".join(name for name in NAMES if name != "__version__")
    added = modules_after(f"from valohai_dagster import {names}")
    assert not {name.partition(".")[0] for name in added} & HEAVY
    assert len([name for name in added if name.startswith("valohai_dagster")]) < 55


def test_the_names_of_a_definitions_file_are_the_cheapest() -> None:
    added = modules_after(
        "from valohai_dagster import load_valohai_project, ValohaiProjectComponent"
    )
    ours = sorted(name for name in added if name.startswith(("valohai_dagster", "valohai_agent")))
    assert len(ours) < 16, ours
    assert len(added) < 60, sorted(added)
