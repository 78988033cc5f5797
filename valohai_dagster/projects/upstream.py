"""What the edges of a step bring, given what its upstream assets last produced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from valohai_dagster.projects.edges import StepEdge
from valohai_dagster.projects.step import StepDefinition


@dataclass(frozen=True, kw_only=True)
class UpstreamFile:
    name: str  # datum name, / as separator; for inputs the placed name
    uri: str  # datum://<id>, or the http(s) URI of an input


@dataclass(frozen=True, kw_only=True)
class UpstreamResult:
    """The latest materialization of one upstream step, as far as edges can see it."""

    outputs: tuple[UpstreamFile, ...] = ()
    inputs: Mapping[str, tuple[UpstreamFile, ...]] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)  # latest value per key (M-14)
    environment_variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class InputFeed:
    """URIs that edges bring to one input, in edge order, and how they meet the step's defaults."""

    uris: tuple[str, ...]
    merge_mode: Literal["replace", "append"] = "replace"


@dataclass(frozen=True, kw_only=True)
class UpstreamValues:
    """Result of the edges. A launch value for the same name beats it, and then its problem does not matter:
    so problems are kept by the target they concern, `("input" | "parameter" | "environment-variable", name)`."""

    inputs: Mapping[str, InputFeed] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    environment_variables: Mapping[str, str] = field(default_factory=dict)
    problems: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


NO_UPSTREAM = UpstreamValues()


def resolve_upstream(
    step: StepDefinition,
    edges: Iterable[StepEdge],
    materializations: Mapping[str, UpstreamResult | None],
) -> UpstreamValues:
    """Values for `step` from `materializations` by source step name; None or absent = never materialized.

    Pure. Edges into other steps are ignored, so the whole project's edges may be given.
    """
    raise NotImplementedError
