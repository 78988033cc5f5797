"""Containers as machines of a worker group, bootstrapped by the real script from a published agent file.

What machines need (Redis, the service, an object store) listens on the Docker host's address, as a control plane does
that machines reach over a network.
"""

from __future__ import annotations

import platform
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.images.build import PYTHON
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.remote_stores import section_of, toml_of
from tests.support.servers.kinds import moto
from tests.support.servers.s3_stores import s3_store
from valohai_agent.machine.one_file import tag
from valohai_dagster.capacity.bootstrap.agent_file import build

if TYPE_CHECKING:
    import docker

GROUP = "machines"


def host_address(client: docker.DockerClient) -> str:
    """Address of this host as containers see it."""
    configs: list[dict[str, str]] = client.networks.get("bridge").attrs["IPAM"]["Config"]
    return next(one["Gateway"] for one in configs if "." in one.get("Gateway", ""))


def agent_file(directory: Path) -> Path:
    """The agent as one file for the Python of the test image."""
    file = directory / "valohai-agent.pyz"
    build(file, tags=[f"cp{PYTHON.replace('.', '')}-{platform.machine()}"])
    return file


def small_agent_file(file: Path) -> Path:
    """One without its dependencies, for a Python that has them."""
    build(file, tags=[tag()], install=lambda tag, folder: None)
    return file


@contextmanager
def network(client: docker.DockerClient) -> Iterator[Any]:
    """A network of machines alone, to be cut off from."""
    made = client.networks.create(f"vh-{uuid.uuid4().hex[:8]}", driver="bridge")
    try:
        yield made
    finally:
        for container in client.containers.list(all=True, filters={"network": str(made.name)}):
            container.remove(force=True, v=True)
        made.remove()


@contextmanager
def control_plane(address: str, directory: Path) -> Iterator[tuple[RedisServer, str]]:
    """Redis and an object store on that address; the settings that name them."""
    redis_server = RedisServer(
        directory / "redis", options=("--bind", "127.0.0.1", address, "--protected-mode", "no")
    )
    with moto(host=address) as endpoint:
        store = s3_store(endpoint)
        redis_server.start()
        try:
            toml = f"""
            redis_url = "redis://{address}:{redis_server.port}/0"
            http_host = "{address}"
            http_port = {free_port()}
            default_store = "far"
            default_group = "{GROUP}"
            """
            yield redis_server, toml + toml_of("far", section_of(store))
        finally:
            redis_server.stop()


def group_section(image: str, network_name: str, **settings: Any) -> str:
    values = {"kind": "docker", "image": image, "network": network_name, **settings}
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for key, value in values.items()
    ]
    return "\n".join([f"[groups.{GROUP}]", *lines, ""])
