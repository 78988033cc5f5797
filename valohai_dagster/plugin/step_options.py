"""What is declared beside valohai.yaml, step by step: partitions, checks, retries, pools, stores.

Each may be one value for all steps or a mapping by step name, where `*` stands for the steps that are not named.
Everything that is wrong with them is found here, when the project is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar, Union

from valohai_dagster.errors import ProjectError
from valohai_dagster.plugin.checks import MetricCheck, problem_of

if TYPE_CHECKING:
    import dagster as dg

    from valohai_dagster.projects.project import Project
    from valohai_dagster.projects.step import StepDefinition

T = TypeVar("T")
PerStep: TypeAlias = Union[T, Mapping[str, T], None]
EVERY_STEP = "*"


class Declarations(TypedDict, total=False):
    """As given to `load_valohai_project`, which documents them."""

    partitions_def: PerStep[dg.PartitionsDefinition[Any]]
    partition_parameter: PerStep[str]
    partition_mappings: Mapping[str, Mapping[str, dg.PartitionMapping]] | None
    backfill_policy: PerStep[dg.BackfillPolicy]
    checks: Mapping[str, Sequence[MetricCheck]] | None
    retry_policy: PerStep[dg.RetryPolicy]
    pool: PerStep[str]
    upload_store: PerStep[str]


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The declarations that concern one step."""

    partitions_def: dg.PartitionsDefinition[Any] | None = None
    partition_parameter: str | None = None
    partition_mappings: Mapping[str, dg.PartitionMapping] | None = None  # by source step
    backfill_policy: dg.BackfillPolicy | None = None
    checks: Sequence[MetricCheck] = ()
    retry_policy: dg.RetryPolicy | None = None
    pool: str | None = None
    upload_store: str | None = None


def options_by_step(project: Project, declared: Declarations) -> dict[str, StepOptions]:
    """Options of every step by its name; ProjectError with every problem."""
    problems: list[str] = []
    chosen: dict[str, dict[str, Any]] = {name: {} for name in project.steps}
    for field in fields(StepOptions):
        for name, value in _spread(project, field.name, declared.get(field.name), problems):
            chosen[name][field.name] = value
    _spare_undeclared_parameter(project, declared.get("partition_parameter"), chosen, problems)
    options = {name: StepOptions(**values) for name, values in chosen.items()}
    for name, step in project.steps.items():
        problems += _problems_of(project, step, options[name])
    if problems:
        raise ProjectError(
            f"project `{project.name}` cannot be loaded with these options:",
            list(dict.fromkeys(problems)),
        )
    return options


def _spread(
    project: Project, option: str, value: Any, problems: list[str]
) -> Iterator[tuple[str, Any]]:
    """(step, value) of one option."""
    if value is None:
        return
    if not isinstance(value, Mapping):
        yield from ((name, value) for name in project.steps)
        return
    by_name = {step.asset_name: name for name, step in project.steps.items()}
    by_name |= {name: name for name in project.steps}
    if EVERY_STEP in value:
        yield from ((name, value[EVERY_STEP]) for name in project.steps)
    for name, one in value.items():
        if name in by_name:
            yield by_name[name], one
        elif name != EVERY_STEP:
            close = get_close_matches(name, by_name, n=1)
            known = ", ".join(f"`{step}`" for step in project.steps)
            hint = f"did you mean `{close[0]}`?" if close else f"there are {known}"
            problems.append(f"{option} names the step `{name}`, which does not exist: {hint}")


def _spare_undeclared_parameter(
    project: Project, given: Any, chosen: dict[str, dict[str, Any]], problems: list[str]
) -> None:
    """One name for the whole project counts for the partitioned steps that declare it; none at all is a mistake."""
    named = set(given) - {EVERY_STEP} if isinstance(given, Mapping) else set()
    concerned = [
        name
        for name, step in project.steps.items()
        if "partition_parameter" in chosen[name] and not named & {name, step.asset_name}
    ]
    spared = [
        name
        for name in concerned
        if chosen[name].get("partitions_def") is None
        or chosen[name]["partition_parameter"] not in project.steps[name].step.parameters
    ]
    if concerned and spared == concerned:
        parameter = chosen[concerned[0]]["partition_parameter"]
        problems.append(
            f"partition_parameter `{parameter}`: no step that has partitions declares a parameter of that name"
        )
    for name in spared:
        del chosen[name]["partition_parameter"]


def _problems_of(project: Project, step: StepDefinition, options: StepOptions) -> Iterator[str]:
    name, parameter = step.name, options.partition_parameter
    if parameter is not None and options.partitions_def is None:
        yield f"step `{name}` has a partition_parameter and no partitions: give it a partitions_def"
    elif parameter is not None and parameter not in step.step.parameters:
        known = ", ".join(f"`{other}`" for other in step.step.parameters) or "none"
        yield (
            f"step `{name}` does not declare its partition_parameter `{parameter}`: it has {known}; "
            "add it to valohai.yaml, or leave the option out and read VH_PARTITION_KEY"
        )
    upstream = {edge.source_step for edge in project.edges if edge.target_step == name}
    for source in options.partition_mappings or {}:
        if source not in upstream:
            known = ", ".join(f"`{other}`" for other in sorted(upstream)) or "none"
            yield f"partition_mappings of step `{name}`: `{source}` is not upstream of it, which are {known}"
    yield from _check_problems(name, options.checks)


def _check_problems(step: str, checks: Sequence[MetricCheck]) -> Iterator[str]:
    names = [check.name for check in checks]
    for check in checks:
        if not re.fullmatch(r"[A-Za-z0-9_]+", check.name):
            yield f"check `{check.name}` of step `{step}`: a name has letters, digits and _ only"
        elif names.count(check.name) > 1:
            yield f"step `{step}` has several checks named `{check.name}`"
        if problem := problem_of(check):
            yield f"check `{check.name}` of step `{step}`: {problem}"
