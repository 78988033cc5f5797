"""Dagster resources of this deployment.

Stores, worker groups and the Redis and database addresses are settings (`valohai.toml`), because the service and the
agents need them without Dagster. What stands here is for assets and sensors of your own.
"""

from __future__ import annotations

from typing import Any

RESOURCES: dict[str, Any] = {}
