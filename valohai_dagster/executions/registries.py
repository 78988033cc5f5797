"""Which registry credentials an image gets (T-22)."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from valohai_agent.protocol import RegistryLogin
from valohai_dagster.settings import RegistrySettings

DOCKER_HUB = "docker.io"


def full_name(image: str) -> str:
    """The image with its registry spelled out, as Docker understands it; tag and digest are left on."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return image
    return f"{DOCKER_HUB}/{image}" if slash else f"{DOCKER_HUB}/library/{image}"


def login_for(image: str, registries: Mapping[str, RegistrySettings]) -> RegistryLogin | None:
    """The credentials of the first entry whose pattern matches the image, with or without its tag."""
    name = full_name(image)
    bare = name.partition("@")[0]
    bare = bare.rpartition(":")[0] if ":" in bare.rpartition("/")[2] else bare
    for entry in registries.values():
        if fnmatchcase(name, entry.match) or fnmatchcase(bare, entry.match):
            return RegistryLogin(
                registry=name.partition("/")[0],
                username=entry.username,
                password=entry.password.get_secret_value(),
            )
    return None
