"""The users of machines in Redis, made anew where the server has forgotten them.

A machine learns its user's password when it joins. Redis forgets users when it restarts, and a replica that takes its
place never knew them; then all agents of joined machines would stand outside although nothing is wrong with them.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from redis.exceptions import NoPermissionError

from valohai_dagster.capacity.bootstrap.joining import (
    agents_passwords,
    groups_joined,
    make_user,
    makes_users,
)
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.errors import ConfigurationError, ServiceUnavailable
from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.executions.shards import steady_time

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
ANYWAY_SECONDS = 60.0  # somebody may have removed a user, or changed a password elsewhere


class MachineUsers:
    """Every conductor does it: the users come out the same whoever makes them."""

    def __init__(self, core: ServiceCore, secret_key: SecretKey) -> None:
        self._core, self._key = core, secret_key
        self.needed = makes_users(core.settings)
        self._server: str | None = None  # whose users are as they should be
        self._made_at = 0.0
        self._trouble = ""

    async def step(self) -> None:
        """Run it again and again."""
        now, server = steady_time(), await self._which_server()
        if server != self._server or now - self._made_at >= ANYWAY_SECONDS:
            self._server, self._made_at = server, now
            await self._make()
        await asyncio.sleep(LOOK_SECONDS)

    async def _which_server(self) -> str:
        """Another one after each start; unknown where we may not ask."""
        try:
            info: Any = await self._core.dispatch.redis.info("server")
        except NoPermissionError:
            return ""
        return str(info.get("run_id", ""))

    async def _make(self) -> None:
        groups = await self._core.read(groups_joined)
        try:
            for group in sorted(groups & self._core.settings.groups.keys()):
                await asyncio.to_thread(self._make_one, group)
        except ServiceUnavailable:
            self._server = None  # it was there a moment ago
        except ConfigurationError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.error("%s", error, extra={"action": "machine-users"})

    def _make_one(self, group: str) -> None:
        records, keys = self._core.records, self._core.keys
        with records.read() as conn:
            passwords = agents_passwords(conn, self._key, keys.deployment, group)
        make_user(self._core.settings, keys, group, passwords)
