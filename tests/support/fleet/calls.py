"""Redis calls of many coroutines in few round trips."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import redis
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from valohai_agent.redis_link import is_transient

BATCH = 256  # calls of one round trip
GATHER_SECONDS = 0.004  # that a call may wait for others: each round trip costs more than a call
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0  # between two tries while Redis is away


class Calls:
    """Whatever is asked for while a round trip is under way travels with the next one. Answers are bytes."""

    def __init__(self, url: str, *, on_return: Callable[[], None] = lambda: None) -> None:
        self.redis: Any = aioredis.Redis.from_url(
            url,
            protocol=2,
            socket_timeout=30,
            socket_connect_timeout=5,
            retry=Retry(NoBackoff(), 0),
        )
        self.made = 0
        self._on_return = on_return
        self._away = False
        self._pending: list[tuple[tuple[Any, ...], asyncio.Future[Any]]] = []
        self._wake = asyncio.Event()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self._wake.clear()
            while self._pending:
                batch, self._pending = self._pending[:BATCH], self._pending[BATCH:]
                await self._send(batch)

    async def _send(self, batch: list[tuple[tuple[Any, ...], asyncio.Future[Any]]]) -> None:
        self.made += len(batch)
        answers: list[Any]
        try:
            async with self.redis.pipeline(transaction=False) as pipe:
                for command, _ in batch:
                    pipe.execute_command(*command)
                answers = await pipe.execute(raise_on_error=False)
        except (redis.RedisError, OSError) as error:
            answers = [error] * len(batch)
        self._note(any(isinstance(a, BaseException) and is_transient(a) for a in answers))
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _note(self, away: bool) -> None:
        came_back, self._away = self._away and not away, away
        if came_back:
            self._on_return()

    async def call(self, *command: Any) -> Any:
        """The answer; raises what redis raises."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending.append((command, future))
        self._wake.set()
        return await future

    async def function(self, name: str, keys: tuple[str, ...], *arguments: Any) -> Any:
        return await self.call("FCALL", name, len(keys), *keys, *arguments)

    async def persist(self, name: str, keys: tuple[str, ...], *arguments: Any) -> Any:
        """The same, repeated until Redis answers; only for what may be applied twice."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return await self.function(name, keys, *arguments)
            except (redis.RedisError, OSError) as error:
                if not is_transient(error):
                    raise
            await asyncio.sleep(pause * random.uniform(0.7, 1.0))
            pause = min(LONGEST_PAUSE_SECONDS, pause * 2)
