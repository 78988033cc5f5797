"""Which registry entry an image belongs to (A-31)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from valohai_agent.runtimes.pulling import registry_of
from valohai_dagster.settings_registries import AnyRegistrySettings

_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]+")  # nothing that a URL would end its host at
_LABELS = re.compile(r"([.:])")


def full_name(image: str) -> str:
    """The image with registry and tag spelled out, as Docker understands it; one with a digest gets no tag."""
    registry = registry_of(image)
    if not image.startswith(f"{registry}/"):
        image = f"{registry}/{image}" if "/" in image else f"{registry}/library/{image}"
    tagged = "@" in image or ":" in image.rpartition("/")[2]
    return image if tagged else f"{image}:latest"


def entry_for(image: str, registries: Mapping[str, AnyRegistrySettings]) -> str | None:
    """The name of the entry with the longest pattern that fits the image, with or without its tag; of two equally
    long ones the first.
    """
    registry = registry_of(image)
    paths = [name.removeprefix(f"{registry}/") for name in _names(image)]
    found = [
        name
        for name, entry in registries.items()
        if host_fits(entry.match, registry)
        and any(_fits(_path(entry.match), path) for path in paths)
    ]
    return max(found, key=lambda name: len(registries[name].match), default=None)


def _names(image: str) -> tuple[str, ...]:
    full = full_name(image)
    undigested = full.partition("@")[0]
    tagged = ":" in undigested.rpartition("/")[2]
    return full, undigested, undigested.rpartition(":")[0] if tagged else undigested


def host_fits(pattern: str, registry: str) -> bool:
    """Whether credentials of that pattern may go to the registry.

    A `*` in the host stands for text between two dots, so that nobody can continue the name of a trusted registry with
    that of their own; only a host that is nothing but `*` is any.
    """
    if _HOST.fullmatch(registry) is None:
        return False
    host = pattern.partition("/")[0]
    if host == "*":
        return True
    wanted, given = _LABELS.split(host), _LABELS.split(registry)
    return len(wanted) == len(given) and all(map(_fits, wanted, given))


def states_host(pattern: str, registry: str) -> bool:
    """Whether the pattern names this very registry."""
    return pattern.partition("/")[0] == registry


def _path(pattern: str) -> str:
    """Of a pattern without a slash, a `*` at its end goes on with the path."""
    host, slash, path = pattern.partition("/")
    return path if slash or not host.endswith("*") else "*"


def _fits(pattern: str, text: str) -> bool:
    """`*` stands for any text, slashes too; every other character for itself. Each part is looked for once: the first
    place is as good as any later one.
    """
    first, *others = pattern.split("*")
    if not others:
        return text == pattern
    *middle, last = others
    end = len(text) - len(last)
    if not (text.startswith(first) and text.endswith(last) and len(first) <= end):
        return False
    position = len(first)
    for part in middle:
        position = text.find(part, position, end)
        if position < 0:
            return False
        position += len(part)
    return True
