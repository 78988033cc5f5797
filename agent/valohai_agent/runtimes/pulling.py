"""What is told about the pull of an image: its progress, and why it failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from valohai_agent.errors import ImageError
from valohai_agent.protocol import RegistryLogin

DOCKER_HUB = "docker.io"
# Words of Docker's and Podman's daemons, and of registries, for missing or wrong credentials.
_REFUSALS = (
    "unauthorized",
    "authentication required",
    "no basic auth credentials",
    "incorrect username or password",
    "invalid username/password",
    "access to the resource is denied",
    "access denied",
    "access forbidden",
)


def registry_of(image: str) -> str:
    """The registry in an image's name, as Docker understands it."""
    first, slash, _ = image.partition("/")
    named = slash and (
        "." in first or ":" in first or first == "localhost" or first != first.lower()
    )
    return first if named else DOCKER_HUB


def pull_error(image: str, words: str, login: RegistryLogin | None, *, present: bool) -> str:
    """Why the image could not be had, what was tried, and the next step. `words` are the daemon's."""
    here = "it is here, but a fresh pull was asked for" if present else "it is not on this worker"
    tried = f"The image {image!r} cannot be pulled ({here}): "
    if not any(refusal in words.lower() for refusal in _REFUSALS):
        return f"{tried}{words}. Check its name and tag, and the registry's credentials."
    registry = registry_of(image)
    if login is not None:
        return (
            f"{tried}the registry {registry} refuses the user {login.username!r} for it: {words}. Check the credentials "
            f"of the entry {_entry(login)}under [registries] in the control plane's valohai.toml."
        )
    return (
        f"{tried}the registry {registry} wants credentials: {words}. Add them as [registries.NAME] with a `match` for "
        "this image to the control plane's valohai.toml, or check the name, if the image is public."
    )


def _entry(login: RegistryLogin) -> str:
    """Names the pattern that chose these credentials (A-31); an older control plane does not tell it."""
    return f"with match = {login.match!r} " if login.match else ""


@contextmanager
def without_login(reason: str | None, warn: Callable[[str], None]) -> Iterator[None]:
    """Around a pull for which the control plane has no credentials, and why; the image may be had without."""
    if reason is None:
        yield
        return
    warn(f"pulling without credentials: {reason}")
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{error} Its credentials: {reason}") from error


class LayerProgress:
    """Sums the layers that are being downloaded."""

    def __init__(self) -> None:
        self._layers: dict[str, tuple[int, int]] = {}

    def note(self, event: Mapping[str, Any]) -> None:
        """Takes one event of the daemon's stream."""
        detail, layer = event.get("progressDetail") or {}, str(event.get("id"))
        if event.get("status") == "Downloading" and detail.get("total"):
            self._layers[layer] = (detail.get("current", 0), detail["total"])
        elif event.get("status") in ("Download complete", "Pull complete"):
            size = self._layers.get(layer, (0, 0))[1]
            self._layers[layer] = (size, size)

    def told(self) -> tuple[str, int, int] | None:
        """The words, bytes done and bytes in all; None while nothing is known."""
        total = sum(size for _, size in self._layers.values())
        done = sum(current for current, _ in self._layers.values())
        return (f"pulling {100 * done // total} %", done, total) if total else None
