"""Completes a launch: what the new machines run at their first start, and how they are marked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.bootstrap.joining import admit_machines, launch_token
from valohai_dagster.capacity.bootstrap.needs import NO_AGENT, lacks
from valohai_dagster.capacity.bootstrap.releases import current_release, offer
from valohai_dagster.capacity.bootstrap.user_data import bootstrap_of, user_data
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.errors import StoreError
from valohai_dagster.records.engine import Records
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import CloudGroupSettings, SimulatedGroupSettings
from valohai_dagster.stores.registry import Stores

VERSION_TAG = "valohai-bootstrap"
BOOT_LIFE = 2  # a token is good for so many times the time that a machine may take to boot


def prepare_launch(
    name: str,
    group: CloudGroupSettings,
    *,
    settings: Settings,
    records: Records,
    stores: Stores,
    secret_key: SecretKey,
    clock: Callable[[], datetime] = utcnow,
) -> Callable[[Launch], Launch]:
    """What a group's reconciler calls before each launch. It blocks on the records and the store of agent files.

    The result raises CloudError when machines could not join whatever the cloud does: no agent is published, its store
    does not answer, or the settings name addresses of this host that mean themselves to machines. The same launch prepared twice has the same token.
    """

    def prepare(launch: Launch) -> Launch:
        if isinstance(group, SimulatedGroupSettings):  # its machines are processes of this host
            return launch
        with records.read() as conn:
            release = current_release(conn)
        if release is None:
            raise _impossible(NO_AGENT, "NoAgentPublished")
        if problems := lacks(group, settings, published=True):
            raise _impossible("; ".join(problems), "OutOfReach")
        try:
            file = offer(release, settings, stores)
        except StoreError as error:
            raise CloudError(
                f"machines cannot get their agent: {error}",
                code="AgentStore",
                trouble=Trouble.outage,
            ) from error
        token = launch_token(secret_key, name, launch.token)
        life = timedelta(seconds=group.boot_seconds * BOOT_LIFE)
        with records.write() as conn:
            admit_machines(
                conn,
                token,
                group=name,
                uses=launch.count,
                now=clock(),
                life=life,
                launch=launch.token,
            )
        bootstrap = bootstrap_of(
            name, group, join_url=settings.machines_url, token=token, release=file
        )
        tags = {**launch.tags, VERSION_TAG: release.version}
        return replace(launch, user_data=user_data(bootstrap), tags=tags)

    return prepare


def _impossible(why: str, code: str) -> CloudError:
    return CloudError(f"Machines cannot be launched: {why}", code=code, trouble=Trouble.invalid)
