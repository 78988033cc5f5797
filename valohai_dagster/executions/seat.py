"""The seat of the local groups: one conductor starts and drains their agents, any number stand by.

The holder renews its entry in Redis; a conductor on another host takes over when the entry expires. One that was
restarted in the same state directory (whose lock it holds) takes its predecessor's seat at once.
"""

from __future__ import annotations

import logging
from typing import Any

import redis.asyncio as aioredis

from valohai_agent.protocol import Keys
from valohai_dagster.executions.identity import Identity

log = logging.getLogger(__name__)

SEAT_SECONDS = 15


class Seat:
    def __init__(self, broker: aioredis.Redis, keys: Keys, identity: Identity) -> None:
        self._redis = broker
        self._key = keys.service()
        self._identity = identity
        self._gone = identity.home
        self.held = False

    async def keep(self) -> bool:
        """Takes or renews the seat; False while another conductor has it."""
        arguments = (self._identity.name, SEAT_SECONDS * 1000, self._gone)
        answer: Any = await self._redis.fcall("vh1_claim", 1, self._key, *arguments)
        self._gone = ""
        if bool(answer) is not self.held:
            self.held = bool(answer)
            word = "looks after" if self.held else "leaves to another conductor"
            log.info("%s the local groups", word, extra={"action": "seat"})
        return self.held

    async def leave(self) -> None:
        self.held = False
        await self._redis.fcall("vh1_unclaim", 1, self._key, self._identity.name)
