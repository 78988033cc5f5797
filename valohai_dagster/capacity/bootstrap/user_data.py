"""What a new machine runs at its first start, as a shell script for cloud-init or as the command of a container.

The script only prepares the ground: Python, Docker, NVIDIA's container toolkit where there is a GPU, the agent's file
checked against its sha256. The rest is done by the agent's own `join`. Run again, as when a stopped container starts,
it goes straight to that. A machine on which it fails powers itself off.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from importlib import resources

from valohai_agent.machine.messages import AgentFile
from valohai_dagster.settings_groups import (
    AnyGroupSettings,
    CloudGroupSettings,
    DockerGroupSettings,
)

_SCRIPT = "bootstrap.sh"


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """`join_url` is the address of the service. `docker`: containers are run, so an engine is needed. `cloud`: whose
    metadata service tells the machine its id; empty where its environment does, or nobody."""

    group: str
    join_url: str
    token: str = field(repr=False)
    release: AgentFile
    cloud: str = ""
    docker: bool = True
    gpus: bool = False
    give_up_seconds: float | None = None
    extra: str = ""


def bootstrap_of(
    name: str, group: AnyGroupSettings, *, join_url: str, token: str, release: AgentFile
) -> Bootstrap:
    """What the settings of a group mean for its machines."""
    common = {"group": name, "join_url": join_url, "token": token, "release": release}
    if not isinstance(group, CloudGroupSettings):
        return Bootstrap(**common, docker=group.runtime != "process")
    contained = isinstance(group, DockerGroupSettings)
    return Bootstrap(
        **common,
        cloud="" if contained else str(getattr(group, "kind", "")),
        docker=group.runtime != "process" and not contained,
        gpus=group.gpus > 0 and not contained,
        give_up_seconds=max(group.boot_seconds, group.dead_man_seconds),
        extra=group.bootstrap_extra,
    )


def user_data(bootstrap: Bootstrap) -> str:
    """The whole script, below the 16 KB that the clouds take."""
    values = {
        "group": bootstrap.group,
        "join_url": bootstrap.join_url,
        "token": bootstrap.token,
        "cloud": bootstrap.cloud,
        "docker": "yes" if bootstrap.docker else "",
        "gpus": "yes" if bootstrap.gpus else "",
        "give_up_seconds": str(int(bootstrap.give_up_seconds or 0)),
        "agent_version": bootstrap.release.version,
        "agent_url": bootstrap.release.url,
        "agent_sha256": bootstrap.release.sha256,
    }
    assigned = "\n".join(f"{name}={shlex.quote(value)}" for name, value in values.items())
    script = resources.files("valohai_dagster.capacity.bootstrap").joinpath(_SCRIPT).read_text()
    extra = bootstrap.extra.rstrip() or ":"
    return script.replace("#VALUES#", assigned).replace("#EXTRA#", extra)
