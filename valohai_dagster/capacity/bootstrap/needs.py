"""What machines of a group need before they can work: an agent to fetch, and the service, Redis and stores in reach.

Read from the settings; nothing is contacted, so what a firewall keeps away is not seen.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from urllib.parse import urlsplit

from valohai_agent.redis_url import redact
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import (
    AnyGroupSettings,
    DockerGroupSettings,
    SimulatedGroupSettings,
)

NO_AGENT = "no agent is published for new machines; `valohai-dagster agents publish FILE` does it"


def lacks(group: AnyGroupSettings, settings: Settings, *, published: bool) -> list[str]:
    """What keeps machines of the group from working, in words; empty when nothing does as far as the settings tell.

    `published`: an agent is. Machines of simulated groups are processes of this host and need none of it.
    """
    if isinstance(group, SimulatedGroupSettings):
        return []
    found = [] if published else [NO_AGENT]
    if problem := redis_out_of_reach(settings):
        found.append(problem)
    if isinstance(group, DockerGroupSettings) and group.network == "host":
        return found  # to them this host is theirs
    for what, address in _addresses(settings):
        if _is_own_host(address):
            text = f"{what} is {redact(address)}, by which a machine would reach itself"
            found.append(f"{text}; set it to an address of this host that machines can reach")
    return found


def redis_out_of_reach(settings: Settings) -> str | None:
    """Why no machine reaches Redis, on whatever network it is; None when it may."""
    address = settings.agent_redis_url or settings.redis_url
    if address is not None and urlsplit(address).scheme != "unix":
        return None
    which = "Redis listens on a socket" if address else "the embedded Redis listens on a socket"
    return (
        f"{which} of this host, which no machine can reach; run one that listens on the network and set redis_url "
        "(or agent_redis_url)"
    )


def _addresses(settings: Settings) -> Iterator[tuple[str, str]]:
    """What machines connect to, each with the setting that says so."""
    if settings.agent_redis_url:
        yield "agent_redis_url", settings.agent_redis_url
    elif settings.redis_url:
        yield "redis_url", settings.redis_url
    yield "join_url", settings.machines_url
    stores = (
        settings.default_store,
        settings.code_store_name,
        settings.log_store_name,
        settings.binary_store_name,
    )
    for name in dict.fromkeys(stores):
        endpoint = getattr(settings.stores[name], "endpoint_url", None)
        if endpoint:
            yield f"endpoint_url of [stores.{name}]", endpoint


def _is_own_host(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
