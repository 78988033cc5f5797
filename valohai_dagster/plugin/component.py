"""`ValohaiProjectComponent`: a project in a `defs.yaml`.

type: valohai_dagster.plugin.ValohaiProjectComponent
attributes:
  source: ../../my-project        # from the file's directory; or a Git URL
  revision: main
  auth:
    token: "{{ env.GIT_TOKEN }}"
  git_sensor: true
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from valohai_dagster.plugin.assets import load_valohai_project
from valohai_dagster.plugin.git_sensor import build_git_sensor
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


class ValohaiProjectComponent(dg.Component, dg.Resolvable, dg.Model):
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
    max_retries: int | None = None
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
        retry = dg.RetryPolicy(max_retries=self.max_retries) if self.max_retries else None
        defs = load_valohai_project(
            where,
            **options,
            group_name=self.group_name,
            owners=self.owners,
            tags=self.tags,
            retry_policy=retry,
        )
        if not self.git_sensor:
            return defs
        sensor = build_git_sensor(
            where, **options, minimum_interval_seconds=self.git_sensor_seconds
        )
        return dg.Definitions.merge(defs, dg.Definitions(sensors=[sensor]))

    def _source(self, component: Path) -> str:
        if is_git_url(self.source):
            return self.source
        base = component if component.is_dir() else component.parent
        return str((base / Path(self.source).expanduser()).resolve())
