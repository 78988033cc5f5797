"""`ValohaiProjectComponent`: a project in a `defs.yaml`.

type: valohai_dagster.plugin.ValohaiProjectComponent
attributes:
  source: ../../my-project        # from the file's directory; or a Git URL
  revision: main
  auth:
    token: "{{ env.GIT_TOKEN }}"
  git_sensor: true
  max_retries: 1                  # of every step ...
  steps:
    train:                        # ... and what counts for one
      pool: gpu
      partitions: {type: daily, start_date: "2026-01-01"}
      partition_parameter: day
      checks:
        - {name: good_enough, condition: accuracy >= 0.9, blocking: true}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import dagster as dg
from dagster.components.resolved.core_models import (
    DailyPartitionsDefinitionModel,
    HourlyPartitionsDefinitionModel,
    StaticPartitionsDefinitionModel,
    TimeWindowPartitionsDefinitionModel,
    WeeklyPartitionsDefinitionModel,
    resolve_partitions_def,
)
from pydantic import ConfigDict

from valohai_dagster.plugin.assets import load_valohai_project
from valohai_dagster.plugin.checks import MetricCheck
from valohai_dagster.plugin.git_sensor import build_git_sensor
from valohai_dagster.plugin.step_options import EVERY_STEP
from valohai_dagster.projects.git import GitAuth, is_git_url


class ProjectAuth(dg.Model, dg.Resolvable):
    """Access to a private repository. Give secrets as `{{ env.NAME }}`, never in the file itself."""

    token: str | None = None
    username: str = "git"
    ssh_key: str | None = None
    known_hosts: str | None = None

    def to_auth(self) -> GitAuth:
        return GitAuth(
            token=self.token,
            username=self.username,
            ssh_key=self.ssh_key,
            known_hosts=Path(self.known_hosts) if self.known_hosts else None,
        )


class CheckModel(dg.Model, dg.Resolvable):
    """A condition on what the step's execution reported; see `MetricCheck`."""

    name: str
    condition: str
    blocking: bool = False
    severity: Literal["ERROR", "WARN"] = "ERROR"
    description: str | None = None

    def to_check(self) -> MetricCheck:
        return MetricCheck(**self.model_dump())


class StepDeclarations(dg.Model, dg.Resolvable):
    """What valohai.yaml has no words for; of one step, or of all that say nothing else."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    partitions: Annotated[
        dg.PartitionsDefinition | None,
        dg.Resolver(
            resolve_partitions_def,
            model_field_type=HourlyPartitionsDefinitionModel
            | DailyPartitionsDefinitionModel
            | WeeklyPartitionsDefinitionModel
            | TimeWindowPartitionsDefinitionModel
            | StaticPartitionsDefinitionModel,
        ),
    ] = None
    partition_parameter: str | None = None
    partitions_per_execution: int | Literal["all"] | None = None  # of a backfill
    max_retries: int | None = None
    retry_delay_seconds: float | None = None
    retry_backoff: Literal["linear", "exponential"] | None = None
    retry_jitter: Literal["full", "plus_minus"] | None = None
    pool: str | None = None
    upload_store: str | None = None

    def options(self) -> dict[str, Any]:
        """By the names of `load_valohai_project`; without those that are not set."""
        found = {
            "partitions_def": self.partitions,
            "partition_parameter": self.partition_parameter,
            "backfill_policy": self._backfill_policy(),
            "retry_policy": self._retry_policy(),
            "pool": self.pool,
            "upload_store": self.upload_store,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _retry_policy(self) -> dg.RetryPolicy | None:
        if not self.max_retries:
            return None
        return dg.RetryPolicy(
            max_retries=self.max_retries,
            delay=self.retry_delay_seconds,
            backoff=dg.Backoff(self.retry_backoff.upper()) if self.retry_backoff else None,
            jitter=dg.Jitter(self.retry_jitter.upper()) if self.retry_jitter else None,
        )

    def _backfill_policy(self) -> dg.BackfillPolicy | None:
        if self.partitions_per_execution is None:
            return None
        if self.partitions_per_execution == "all":
            return dg.BackfillPolicy.single_run()
        return dg.BackfillPolicy.multi_run(self.partitions_per_execution)


class StepModel(StepDeclarations):
    """The declarations of one step."""

    checks: Sequence[CheckModel] | None = None


class ValohaiProjectComponent(dg.Component, StepDeclarations):
    """The steps of one valohai.yaml project as assets.

    `source` is a directory, relative to the component's own, or a Git URL. A project that cannot be read becomes
    one asset that tells why, so that the rest of the code location loads.
    """

    source: str
    revision: str | None = None
    yaml_path: str = "valohai.yaml"
    name: str | None = None
    auth: ProjectAuth | None = None
    group_name: str | None = None
    owners: Sequence[str] | None = None
    tags: Mapping[str, str] | None = None
    steps: dict[str, StepModel] | None = None
    external_assets: bool = True
    git_sensor: bool = False
    git_sensor_seconds: int = 60

    @classmethod
    def get_spec(cls) -> dg.ComponentTypeSpec:
        return dg.ComponentTypeSpec(
            description="Steps of a valohai.yaml project as assets.", tags=["valohai", "ml"]
        )

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        where = self._source(context.path)
        options: dict[str, Any] = {
            "revision": self.revision,
            "yaml_path": self.yaml_path,
            "name": self.name,
            "auth": self.auth.to_auth() if self.auth else None,
        }
        defs = load_valohai_project(
            where,
            **options,
            group_name=self.group_name,
            owners=self.owners,
            tags=self.tags,
            external_assets=self.external_assets,
            **self._declared(),
        )
        if not self.git_sensor:
            return defs
        sensor = build_git_sensor(
            where, **options, minimum_interval_seconds=self.git_sensor_seconds
        )
        return dg.Definitions.merge(defs, dg.Definitions(sensors=[sensor]))

    def _declared(self) -> dict[str, Any]:
        """Every option as a mapping by step, `*` for the component's own."""
        out: dict[str, dict[str, Any]] = {}
        for name, value in self.options().items():
            out.setdefault(name, {})[EVERY_STEP] = value
        for step, declared in (self.steps or {}).items():
            for name, value in declared.options().items():
                out.setdefault(name, {})[step] = value
            if declared.checks:
                out.setdefault("checks", {})[step] = [one.to_check() for one in declared.checks]
        return out

    def _source(self, component: Path) -> str:
        if is_git_url(self.source):
            return self.source
        base = component if component.is_dir() else component.parent
        return str((base / Path(self.source).expanduser()).resolve())
