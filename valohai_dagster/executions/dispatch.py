"""The service's async hands on Redis: queue, leases, commands, grants, follow streams.

Thin: each method is one step of the protocol; what to do and when is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import redis.asyncio as aioredis

from valohai_agent.protocol import (
    PROTOCOL_VERSION,
    Command,
    Job,
    Keys,
    Worker,
    ready_score,
)
from valohai_dagster.executions.stream import FollowEvent

FOLLOW_LENGTH = 2_000  # entries kept per execution
FOLLOW_SECONDS = 24 * 3600
GRANT_SECONDS = 120  # an uncollected grant vanishes after this long
COMMAND_SECONDS = 24 * 3600
BELL_LENGTH = 64  # more rings than agents could hear are pointless


class Dispatch:
    def __init__(self, broker: aioredis.Redis, keys: Keys) -> None:
        self.redis = broker
        self.keys = keys

    async def enqueue(
        self, job: Job, *, priority: int = 0, front: bool = False, force: bool = False
    ) -> bool:
        """Puts the job into its group's queue and wakes an agent; False if that attempt is known already."""
        keys, group, exec_id = self.keys, job.group, job.execution_id
        score = ready_score(await self.redis.incr(keys.sequence()), priority=priority, front=front)
        added = await self.redis.fcall(
            "vh1_enqueue",
            3,
            *(keys.ready(group), keys.job(group, exec_id), keys.lease(group, exec_id)),
            *(exec_id, job.model_dump_json(), str(job.attempt), str(PROTOCOL_VERSION)),
            *(str(int(score)), "1" if force else "0"),
        )
        if added:
            await self.ring(group)
        return bool(added)

    async def ring(self, group: str) -> None:
        bell = self.keys.bell(group)
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.rpush(bell, "1")
            pipe.ltrim(bell, -BELL_LENGTH, -1)
            await pipe.execute()

    async def withdraw(self, group: str, execution_id: str) -> bool:
        """Takes a waiting job out of the queue; False when a worker has it already."""
        ready, lease = self.keys.ready(group), self.keys.lease(group, execution_id)
        return bool(await self.redis.fcall("vh1_withdraw", 2, ready, lease, execution_id))

    async def position(self, group: str, execution_id: str) -> int | None:
        """How many jobs are ahead; None when it does not wait."""
        rank: Any = await self.redis.zrank(self.keys.ready(group), execution_id)
        return rank

    async def waiting(self, group: str) -> int:
        return await self.redis.zcard(self.keys.ready(group))

    async def lease(self, group: str, execution_id: str) -> dict[str, str]:
        """The live lease's fields, empty when there is none."""
        fields: Any = await self.redis.hgetall(self.keys.lease(group, execution_id))
        return fields

    async def where(self, items: Iterable[tuple[str, str]]) -> dict[str, tuple[bool, bool]]:
        """For (group, execution id) pairs: whether it waits in the queue, whether a lease is alive."""
        items = list(items)
        async with self.redis.pipeline(transaction=False) as pipe:
            for group, execution_id in items:
                pipe.zscore(self.keys.ready(group), execution_id)
                pipe.exists(self.keys.lease(group, execution_id))
            answers = await pipe.execute()
        pairs = zip(answers[::2], answers[1::2], strict=True)
        return {
            execution_id: (score is not None, bool(alive))
            for (_, execution_id), (score, alive) in zip(items, pairs, strict=True)
        }

    async def drop_lease(self, group: str, execution_id: str) -> None:
        await self.redis.delete(self.keys.lease(group, execution_id))

    async def forget(
        self, group: str, execution_id: str, attempt: int, live_log_seconds: int
    ) -> None:
        """Removes an ended execution's keys; its live log stays readable for a while."""
        keys = self.keys
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.zrem(keys.ready(group), execution_id)
            pipe.delete(keys.job(group, execution_id), keys.lease(group, execution_id))
            pipe.delete(keys.grant(group, execution_id))
            pipe.expire(keys.log(group, execution_id, attempt), live_log_seconds)
            await pipe.execute()

    async def command(self, group: str, worker: str, command: Command) -> None:
        stream = self.keys.command(group, worker)
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.xadd(stream, {"c": command.model_dump_json()}, maxlen=1000)
            pipe.expire(stream, COMMAND_SECONDS)
            await pipe.execute()

    async def push_grants(self, group: str, execution_id: str, sealed: bytes) -> None:
        stream = self.keys.grant(group, execution_id)
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.xadd(stream, {"g": sealed}, maxlen=1000)
            pipe.expire(stream, GRANT_SECONDS)
            await pipe.execute()

    async def publish(self, execution_id: str, events: Iterable[FollowEvent]) -> None:
        stream = self.keys.follow(execution_id)
        async with self.redis.pipeline(transaction=False) as pipe:
            for event in events:
                pipe.xadd(
                    stream, {"e": event.model_dump_json()}, maxlen=FOLLOW_LENGTH, approximate=True
                )
            pipe.expire(stream, FOLLOW_SECONDS)
            await pipe.execute()

    async def workers(self, group: str) -> dict[str, Worker]:
        """Workers of the group that have checked in and not fallen silent."""
        roster = self.keys.roster(group)
        known: Any = await self.redis.smembers(roster)
        names = sorted(known)
        async with self.redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hgetall(self.keys.worker(group, name))
            entries = await pipe.execute() if names else []
        gone = [name for name, fields in zip(names, entries, strict=True) if not fields]
        if gone:
            await self.redis.srem(roster, *gone)
        found = [worker for fields in entries if (worker := _worker(fields, group))]
        return {worker.name: worker for worker in found}


def _worker(fields: Mapping[str, Any], group: str) -> Worker | None:
    if "name" not in fields or "incarnation" not in fields:
        return None
    return Worker.model_validate({"group": group, **fields})
