"""How a bare machine becomes a worker of its group: published agents, join tokens, and what it runs at its first start."""

from valohai_dagster.capacity.bootstrap.launching import prepare_launch
from valohai_dagster.capacity.bootstrap.releases import Release, current_release, is_outdated

__all__ = ["Release", "current_release", "is_outdated", "prepare_launch"]
