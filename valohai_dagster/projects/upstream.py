"""What the edges of a step bring, given what its upstream assets last produced."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from valohai_dagster.projects.edges import StepEdge
from valohai_dagster.projects.step import StepDefinition

Target = tuple[str, str]  # ("input" | "parameter" | "environment-variable", name)


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
    """Result of the edges.

    A launch value for the same name beats it, and then its problem does not matter: so problems and warnings are
    kept by the target they concern. `unmet` says which upstream never ran, for the message when the target
    then has no value at all.
    """

    inputs: Mapping[str, InputFeed] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    environment_variables: Mapping[str, str] = field(default_factory=dict)
    problems: Mapping[Target, tuple[str, ...]] = field(default_factory=dict)
    unmet: Mapping[Target, tuple[str, ...]] = field(default_factory=dict)


NO_UPSTREAM = UpstreamValues()


def resolve_upstream(
    step: StepDefinition,
    edges: Iterable[StepEdge],
    materializations: Mapping[str, UpstreamResult | None],
) -> UpstreamValues:
    """Values for `step` from `materializations` by source step name; None or absent = never materialized.

    Pure. Edges into other steps are ignored, so the whole project's edges may be given.
    """
    found = _Found(step)
    for edge in edges:
        if edge.target_step != step.name or edge.target_type == "dependency":
            continue
        result = materializations.get(edge.source_step)
        if result is None:
            found.unmet.setdefault((edge.target_type, edge.target_key), []).append(edge.source_step)
        elif edge.target_type == "input":
            found.feed_input(edge, result)
        else:
            found.feed_value(edge, result)
    return found.values()


def matches(pattern: str, name: str) -> bool:
    """P-11: `*` matches any characters, `/` too, against the whole name; a pattern without `/` also the base name."""
    glob = _glob(pattern)
    return bool(
        glob.fullmatch(name) or ("/" not in pattern and glob.fullmatch(name.rsplit("/", 1)[-1]))
    )


@lru_cache(maxsize=256)
def _glob(pattern: str) -> re.Pattern[str]:
    """`*` and `?` only: brackets are ordinary characters of file names."""
    parts = (
        ".*" if part == "*" else "." if part == "?" else re.escape(part)
        for part in re.split(r"([*?])", pattern)
    )
    return re.compile("".join(parts), re.DOTALL)


@dataclass
class _Found:
    step: StepDefinition
    inputs: dict[str, list[str]] = field(default_factory=dict)
    modes: dict[str, Literal["replace", "append"]] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    environment_variables: dict[str, str] = field(default_factory=dict)
    problems: dict[Target, list[str]] = field(default_factory=dict)
    unmet: dict[Target, list[str]] = field(default_factory=dict)

    def values(self) -> UpstreamValues:
        feeds = {
            name: InputFeed(uris=tuple(dict.fromkeys(uris)), merge_mode=self.modes[name])
            for name, uris in self.inputs.items()
        }
        return UpstreamValues(
            inputs=feeds,
            parameters=self.parameters,
            environment_variables=self.environment_variables,
            problems={target: tuple(words) for target, words in self.problems.items()},
            unmet={target: tuple(dict.fromkeys(words)) for target, words in self.unmet.items()},
        )

    def feed_input(self, edge: StepEdge, result: UpstreamResult) -> None:
        """P-12: files add up. P-14: nothing matched is an error unless the input is optional."""
        files = _matching_files(edge, result)
        declared = self.step.step.inputs.get(edge.target_key)
        if not files and not (declared and declared.optional):
            self._problem(edge, f"matched no files; {_seen(edge, result)}")
        self.inputs.setdefault(edge.target_key, []).extend(file.uri for file in files)
        self.modes.setdefault(edge.target_key, edge.merge_mode)

    def feed_value(self, edge: StepEdge, result: UpstreamResult) -> None:
        """P-17: a missing key is an error of the target."""
        source = {
            "parameter": result.parameters,
            "metadata": result.metadata,
            "environment-variable": result.environment_variables,
        }[edge.source_type]
        value = source.get(edge.source_key)
        if value is None:
            known = ", ".join(f"`{name}`" for name in sorted(source)) or "nothing"
            self._problem(edge, f"found no value; the last run of `{edge.source_step}` has {known}")
        elif edge.target_type == "environment-variable":
            self.environment_variables[edge.target_key] = text_of(value)
        else:
            self._feed_parameter(edge, value)

    def _feed_parameter(self, edge: StepEdge, value: Any) -> None:
        declared = self.step.step.parameters.get(edge.target_key)
        if isinstance(value, (list, tuple)) and declared is not None and not declared.multiple:
            self._problem(edge, "brings a list, and the parameter is not `multiple` (P-17)")
        else:
            self.parameters[edge.target_key] = value

    def _problem(self, edge: StepEdge, words: str) -> None:
        origin = f" of pipeline `{edge.pipeline}`" if edge.pipeline else ""
        message = f"the edge {edge.source} -> {edge.target}{origin} {words}"
        self.problems.setdefault((edge.target_type, edge.target_key), []).append(message)


def _matching_files(edge: StepEdge, result: UpstreamResult) -> list[UpstreamFile]:
    """Outputs by datum name; inputs by input name, or by file name when no input name matches (P-16)."""
    if edge.source_type == "output":
        return [file for file in result.outputs if matches(edge.source_key, file.name)]
    named = [
        files for name, files in result.inputs.items() if _glob(edge.source_key).fullmatch(name)
    ]
    if named:
        return [file for files in named for file in files]
    return [
        file
        for files in result.inputs.values()
        for file in files
        if matches(edge.source_key, file.name)
    ]


def _seen(edge: StepEdge, result: UpstreamResult, limit: int = 10) -> str:
    files = (
        result.outputs
        if edge.source_type == "output"
        else [f for files in result.inputs.values() for f in files]
    )
    names = [repr(file.name) for file in files]
    if not names:
        return f"the last run of `{edge.source_step}` has none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"the last run of `{edge.source_step}` has {', '.join(names[:limit])}{more}"


def text_of(value: Any) -> str:
    """Text of a value for an environment variable: `str` for scalars, JSON for the rest."""
    return (
        json.dumps(value, ensure_ascii=False)
        if isinstance(value, (list, tuple, dict))
        else str(value)
    )
