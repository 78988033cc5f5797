"""The op tag `valohai/step`: a step in a job's snapshot, readable without user code.

It marks the ops that are ours, and carries what a driver needs that snapshots leave out (DAGSTER_NOTES 1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from valohai_dagster.projects.step import StepDefinition

if TYPE_CHECKING:
    from valohai_dagster.projects.edges import StepEdge
    from valohai_dagster.projects.project import Project

STEP_TAG = "valohai/step"
TAG_VERSION = 1


def step_tag(
    project: Project,
    step: StepDefinition,
    *,
    asset_key: Sequence[str],
    parents: Sequence[Sequence[str]],
    code_version: str,
    retry: Mapping[str, Any] | None = None,
) -> str:
    """JSON of one step: its definition, place in the asset graph, commit and retry policy. No credentials."""
    source = project.source
    data = {
        "v": TAG_VERSION,
        "step": step.to_dict(),
        "project": {"name": project.name, "source": source.location, "yaml": source.yaml_path},
        "commit": {
            "identifier": project.commit.identifier,
            "ref": project.commit.ref,
            "adhoc": project.commit.adhoc,
        },
        "asset_key": list(asset_key),
        "output": "result",
        "parents": [list(parent) for parent in parents],
        "edges": [asdict(edge) for edge in edges_into(project, step.name)],
        "code_version": code_version,
        "retry": dict(retry) if retry else None,
        "checks": [],
    }
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, default=str)


def read_step_tag(text: str) -> dict[str, Any]:
    """The tag's content with `step` restored; raises ValueError for a version that this side does not know."""
    data = json.loads(text)
    if data.get("v") != TAG_VERSION:
        raise ValueError(
            f"the tag {STEP_TAG} has version {data.get('v')!r}, this side reads {TAG_VERSION}"
        )
    return {**data, "step": StepDefinition.from_dict(data["step"])}


def edges_into(project: Project, step: str) -> list[StepEdge]:
    return [edge for edge in project.edges if edge.target_step == step]
