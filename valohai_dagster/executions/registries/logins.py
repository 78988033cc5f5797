"""The credentials that go with an image, minted when they are needed and kept until shortly before their end."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import datetime

from valohai_agent.protocol import RegistryLogin, utcnow
from valohai_agent.runtimes.pulling import registry_of
from valohai_dagster.errors import RegistryError
from valohai_dagster.executions.registries import amazon, google, microsoft
from valohai_dagster.executions.registries.names import entry_for
from valohai_dagster.executions.registries.tokens import MintFailure, Token
from valohai_dagster.settings_registries import (
    AnyRegistrySettings,
    AzureRegistrySettings,
    DockerRegistrySettings,
    EcrRegistrySettings,
    EcrRoleRegistrySettings,
    GoogleRegistrySettings,
)

log = logging.getLogger(__name__)


class RegistryLogins:
    """Safe for several threads; calls the clouds' servers, so not for the event loop."""

    def __init__(
        self,
        registries: Mapping[str, AnyRegistrySettings],
        *,
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self._registries = registries
        self._clock = clock
        self._tokens: dict[tuple[str, str], Token] = {}
        self._locks: defaultdict[tuple[str, str], threading.Lock] = defaultdict(threading.Lock)

    def login_for(self, image: str) -> RegistryLogin | None:
        """The credentials of the entry that the image belongs to; None if it belongs to none.

        Raises `RegistryError` with the entry and what to check when no token can be had.
        """
        name = entry_for(image, self._registries)
        if name is None:
            return None
        registry, entry = registry_of(image), self._registries[name]
        try:
            token = self._token(name, entry, registry)
        except MintFailure as failure:
            text = (
                f"there are no credentials for the registry {registry}: {failure}. They come from [registries.{name}] "
                f"(match = {entry.match!r}): {failure.hint}"
            )
            log.warning("%s", text, extra={"action": "registry-login", "registry": name})
            raise RegistryError(text) from failure
        return RegistryLogin(
            registry=registry, username=token.username, password=token.password, match=entry.match
        )

    def _token(self, name: str, entry: AnyRegistrySettings, registry: str) -> Token:
        """One at a time for each registry: a hundred executions that start together share one token."""
        key = (name, registry)
        with self._locks[key]:
            known = self._tokens.get(key)
            if known is None or not known.is_good(self._clock()):
                known = self._tokens[key] = _mint(entry, registry, self._clock())
            return known


def _mint(entry: AnyRegistrySettings, registry: str, now: datetime) -> Token:
    if isinstance(entry, DockerRegistrySettings):
        password = entry.password.get_secret_value()
        return Token(username=entry.username, password=password, minted_at=now)
    if isinstance(entry, (EcrRegistrySettings, EcrRoleRegistrySettings)):
        return amazon.mint(entry, registry, now)
    if isinstance(entry, GoogleRegistrySettings):
        return google.mint(entry, registry, now)
    if isinstance(entry, AzureRegistrySettings):
        return microsoft.mint(entry, registry, now)
    raise TypeError(f"no such kind of registry: {entry!r}")
