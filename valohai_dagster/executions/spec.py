"""From a step and what was asked for to an `ExecutionSpec`; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from valohai_dagster.executions.spec_model import CommitRef, ExecutionSpec
from valohai_dagster.projects.step import StepDefinition
from valohai_dagster.projects.upstream import NO_UPSTREAM, UpstreamValues


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What the Launchpad gives. An absent name keeps the step's default; None for a parameter removes it (Y-39)."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Sequence[str] | str] = field(default_factory=dict)  # replaces the defaults (Y-41)
    image: str | None = None
    environment: str | None = None
    environment_variables: Mapping[str, str] = field(default_factory=dict)
    environment_variable_groups: Sequence[str] | None = None  # None: those of the step (Y-17)
    tags: Sequence[str] = ()
    title: str | None = None
    time_limit: int | str | None = None  # seconds or Y-19 text; None: the step's
    no_output_timeout: int | str | None = None
    priority: int = 0
    fail_fast: bool = False  # C-22
    commit: str | None = None  # for `project_at`; build_spec itself ignores both
    adhoc: bool = False


@dataclass(frozen=True, kw_only=True)
class LaunchIds:
    """Who runs it: identifiers that go into the spec unchanged."""

    execution_id: str
    instance_id: str = ""
    run_id: str | None = None
    step_key: str | None = None
    retry_number: int = 0
    log_key: Sequence[str] | None = None
    asset_key: Sequence[str] | None = None
    partition_key: str | None = None
    creator: str = ""


def build_spec(
    step: StepDefinition,
    config: StepConfig,
    *,
    commit: CommitRef,
    ids: LaunchIds,
    upstream: UpstreamValues = NO_UPSTREAM,
    known_variables: frozenset[str] | None = None,
) -> ExecutionSpec:
    """Raise SpecError naming every problem at once: unknown names, bounds, missing values.

    `known_variables` are names that secrets would provide; with None, required ones without a value are left to the
    execution service to check (Y-51).
    """
    raise NotImplementedError
