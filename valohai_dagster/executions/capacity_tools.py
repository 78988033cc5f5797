"""What looking after groups of machines needs from elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import sqlalchemy as sa

from valohai_dagster.capacity.clouds.base import Launch
from valohai_dagster.capacity.clouds.registry import OpenDriver, open_driver
from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.settings_groups import CloudGroupSettings

Prepare = Callable[[Launch], Launch]


@dataclass(frozen=True, kw_only=True)
class Tools:
    """`prepare`: what completes the launches of a group with user data and tags. `release`: version of what new machines
    are started with, None where that is not known. `outdated`: whether a worker of this version is too old for it."""

    open_driver: OpenDriver
    prepare: Callable[[str, CloudGroupSettings], Prepare]
    release: Callable[[sa.Connection], str | None]
    outdated: Callable[[str, str], bool]
    on_gone: Callable[[str, str, str], Awaitable[None]]  # group, worker, what happened
    name: str  # of this conductor


def make_tools(
    core: ServiceCore,
    *,
    name: str,
    on_gone: Callable[[str, str, str], Awaitable[None]],
    drivers: OpenDriver | None = None,
) -> Tools:
    """The usual ones. `drivers` stands in for those of the clouds."""
    deployment, state_dir = core.records.deployment_id, core.settings.state_dir
    return Tools(
        open_driver=drivers
        or functools.partial(open_driver, deployment=deployment, state_dir=state_dir),
        prepare=lambda group, settings: lambda launch: launch,
        release=lambda conn: None,
        outdated=lambda version, release: False,
        on_gone=on_gone,
        name=name,
    )
