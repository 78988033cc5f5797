"""Which registry entry an image belongs to (A-31)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from valohai_dagster.settings_registries import AnyRegistrySettings

DOCKER_HUB = "docker.io"


def full_name(image: str) -> str:
    """The image with registry and tag spelled out, as Docker understands it; one with a digest gets no tag."""
    first, slash, _ = image.partition("/")
    if not (slash and ("." in first or ":" in first or first == "localhost")):
        image = f"{DOCKER_HUB}/{image}" if slash else f"{DOCKER_HUB}/library/{image}"
    tagged = "@" in image or ":" in image.rpartition("/")[2]
    return image if tagged else f"{image}:latest"


def registry_of(image: str) -> str:
    """The host (and port) that serves the image."""
    return full_name(image).partition("/")[0]


def entry_for(image: str, registries: Mapping[str, AnyRegistrySettings]) -> str | None:
    """The name of the entry with the longest pattern that fits the image, with or without its tag; of two equally
    long ones the first.
    """
    names = _names(image)
    found = [
        name
        for name, entry in registries.items()
        if any(_fits(entry.match, candidate) for candidate in names)
    ]
    return max(found, key=lambda name: len(registries[name].match), default=None)


def _names(image: str) -> tuple[str, ...]:
    full = full_name(image)
    undigested = full.partition("@")[0]
    tagged = ":" in undigested.rpartition("/")[2]
    return full, undigested, undigested.rpartition(":")[0] if tagged else undigested


def _fits(pattern: str, name: str) -> bool:
    """`*` stands for any text, slashes too; every other character for itself."""
    regex = ".*".join(map(re.escape, pattern.split("*")))
    return re.fullmatch(regex, name, re.DOTALL) is not None
