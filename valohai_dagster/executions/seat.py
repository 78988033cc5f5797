"""The seat of the execution service: one at a time per deployment, any number standing by.

The holder renews its entry in Redis; a service on another host takes over when the entry expires. A service that
was restarted in the same state directory (whose lock it holds) takes its predecessor's seat at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from typing import Any

import redis.asyncio as aioredis

from valohai_agent.protocol import Keys
from valohai_dagster.errors import ServiceUnavailable
from valohai_dagster.settings import Settings

log = logging.getLogger(__name__)

SEAT_SECONDS = 15
STAND_BY_SECONDS = 1.0


class SeatLost(ServiceUnavailable):
    """Another service has taken over; this one must not act any more."""


class Seat:
    def __init__(self, broker: aioredis.Redis, keys: Keys, settings: Settings) -> None:
        self._redis = broker
        self._key = keys.service()
        self._home = f"{os.uname().nodename}:{settings.state_dir}:"
        self._holder = self._home + secrets.token_hex(8)

    async def take(self) -> None:
        """Waits until the seat is ours."""
        while not await self._redis.set(self._key, self._holder, nx=True, ex=SEAT_SECONDS):
            current: Any = await self._redis.get(self._key)
            if current and current.startswith(self._home):
                await self._redis.set(self._key, self._holder, ex=SEAT_SECONDS)
                return
            log.info("standing by: %s serves", current, extra={"action": "stand-by"})
            await asyncio.sleep(STAND_BY_SECONDS)

    async def keep(self) -> None:
        """Renews the seat; raises `SeatLost` when somebody else has it."""
        current: Any = await self._redis.get(self._key)
        if current not in (None, self._holder):
            raise SeatLost(f"another execution service has taken over: {current}")
        await self._redis.set(self._key, self._holder, ex=SEAT_SECONDS)
