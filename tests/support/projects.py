"""Small projects on disk, and their steps as specs with a published archive."""

from __future__ import annotations

import textwrap
import uuid
from pathlib import Path
from typing import Any

from valohai_dagster.executions.spec import LaunchIds, StepConfig, build_spec
from valohai_dagster.executions.spec_model import CommitRef, ExecutionSpec
from valohai_dagster.projects.archive import build_archive, publish
from valohai_dagster.projects.project import Project, load_project
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import open_stores


def write_project(root: Path, yaml: str, **files: str) -> Path:
    """A project directory; `files` are texts by name with `__` for the dot."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "valohai.yaml").write_text(textwrap.dedent(yaml))
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(textwrap.dedent(text))
    return root


def step_yaml(*commands: str, name: str = "run", image: str = "vt-busybox", extra: str = "") -> str:
    """A valohai.yaml with one step that runs the commands."""
    lines = [f"- step:\n    name: {name}\n    image: {image}\n    command:"]
    lines += [
        "      - |\n" + textwrap.indent(textwrap.dedent(c).strip(), " " * 10) for c in commands
    ]
    return "\n".join(lines) + "\n" + textwrap.indent(textwrap.dedent(extra), "    ")


def spec_of(project: Path | Project, step: str, settings: Settings, **config: Any) -> ExecutionSpec:
    """The step's spec as the Dagster plugin would submit it, its code archive published."""
    if isinstance(project, Path):
        project = load_project(project, cache_dir=settings.state_dir / "projects")
    published = publish(build_archive(project), open_stores(settings).code)
    ids = LaunchIds(execution_id=str(uuid.uuid4()), run_id=str(uuid.uuid4()), step_key=step)
    return build_spec(
        project.step(step), StepConfig(**config), commit=CommitRef(**vars(published)), ids=ids
    )
