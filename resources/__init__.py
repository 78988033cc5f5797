"""Dagster resources of this deployment.

Stores, worker groups and the Redis and database addresses are settings (`valohai.toml`), because the service and the
agents need them without Dagster. What stands here is for assets and sensors of your own: `valohai` reads what
executions left behind, `store_<name>` any store of the settings, and `s3_<name>`, `gcs_<name>`, `azure_<name>` are the
resources of dagster-aws, dagster-gcp and dagster-azure for stores of these kinds.
"""

from __future__ import annotations

from typing import Any

from valohai_dagster import ValohaiResource, store_resources

RESOURCES: dict[str, Any] = {"valohai": ValohaiResource(settings_file=None), **store_resources()}
