"""Opens the driver of a group's cloud. The SDK of a cloud is imported only when a group of it is there."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from valohai_dagster.capacity.clouds.base import Driver
from valohai_dagster.errors import ConfigurationError
from valohai_dagster.settings_groups import CloudGroupSettings

OpenDriver = Callable[[str, CloudGroupSettings], Driver]

_DRIVERS = {
    "aws": ("aws", "AwsDriver"),
    "gcp": ("gcp", "GcpDriver"),
    "azure": ("azure", "AzureDriver"),
    "openstack": ("openstack", "OpenStackDriver"),
    "docker": ("docker", "DockerDriver"),
    "simulated": ("simulated", "SimulatedDriver"),
}


def open_driver(
    name: str,
    settings: CloudGroupSettings,
    *,
    deployment: str,
    state_dir: Path,
    redis_url: str | None = None,
) -> Driver:
    """The driver of a group. Raises ConfigurationError when its client library is not installed.

    `redis_url`: where simulated machines, which are on this host, join; without it they have no agents.
    """
    kind: str = getattr(settings, "kind", "")
    module, attribute = _DRIVERS[kind]
    options: dict[str, Any] = {}
    if kind == "simulated":
        options = {"state_dir": state_dir, "redis_url": redis_url}
    try:
        home = importlib.import_module(f"valohai_dagster.capacity.clouds.{module}")
        return getattr(home, attribute)(name, settings, deployment=deployment, **options)
    except ImportError as error:
        raise ConfigurationError(
            f"group {name} is of kind {kind!r}, whose client library is not installed here ({error}); "
            f"install it with `pip install 'valohai-dagster[{kind}]'`"
        ) from error
