"""What looking after groups of machines needs from elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import sqlalchemy as sa

from valohai_dagster.capacity.bootstrap.launching import prepare_launch
from valohai_dagster.capacity.bootstrap.releases import Release, current_release
from valohai_dagster.capacity.clouds.base import Launch
from valohai_dagster.capacity.clouds.registry import OpenDriver, open_driver
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.settings_groups import CloudGroupSettings, SimulatedGroupSettings

Prepare = Callable[[Launch], Launch]


@dataclass(frozen=True, kw_only=True)
class Tools:
    """`prepare`: what completes the launches of a group with user data and tags. `release`: the agent that its new
    machines are started with, None where they are started with this host's."""

    open_driver: OpenDriver
    prepare: Callable[[str, CloudGroupSettings], Prepare]
    release: Callable[[sa.Connection, CloudGroupSettings], Release | None]
    on_gone: Callable[[str, str, str], Awaitable[None]]  # group, worker, what happened
    name: str  # of this conductor


def make_tools(
    core: ServiceCore,
    *,
    name: str,
    secret_key: SecretKey,
    on_gone: Callable[[str, str, str], Awaitable[None]],
    redis_url: str,
    drivers: OpenDriver | None = None,
) -> Tools:
    """The usual ones. `redis_url`: for machines on this host. `drivers` stands in for those of the clouds."""
    deployment, state_dir = core.records.deployment_id, core.settings.state_dir
    usual = functools.partial(
        open_driver, deployment=deployment, state_dir=state_dir, redis_url=redis_url
    )
    return Tools(
        open_driver=drivers or usual,
        prepare=functools.partial(
            prepare_launch,
            settings=core.settings,
            records=core.records,
            stores=core.stores,
            secret_key=secret_key,
            clock=core.clock,
        ),
        release=_release,
        on_gone=on_gone,
        name=name,
    )


def _release(conn: sa.Connection, group: CloudGroupSettings) -> Release | None:
    return None if isinstance(group, SimulatedGroupSettings) else current_release(conn)
