"""Pipelines as dependencies between steps, for the asset graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from valohai_yaml.objs import Pipeline, Step

from valohai_dagster.projects.problems import Problem

SourceType = Literal["output", "input", "parameter", "metadata", "environment-variable", "dependency"]
TargetType = Literal["input", "parameter", "environment-variable", "dependency"]


@dataclass(frozen=True, kw_only=True)
class StepEdge:
    """What the asset of `target_step` takes from the asset of `source_step` (P-10). Names are the steps' own."""

    source_step: str
    source_type: SourceType
    source_key: str
    target_step: str
    target_type: TargetType
    target_key: str
    merge_mode: Literal["replace", "append"] = "replace"  # of the target node (P-12, P-13)
    pipeline: str = ""  # where it comes from, for messages


def derive_edges(
    steps: Mapping[str, Step], pipelines: Mapping[str, Pipeline]
) -> tuple[tuple[StepEdge, ...], tuple[Problem, ...]]:
    """Edges of the step graph, without cycles, and what was left out and why."""
    raise NotImplementedError
