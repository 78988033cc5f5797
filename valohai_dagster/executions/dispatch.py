"""The service's async hands on Redis: queue, leases, commands, grants, follow streams.

Thin: each method is one step of the protocol; what to do and when is decided elsewhere.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import redis.asyncio as aioredis

from valohai_agent.protocol import (
    MAX_INPUT_MARKS,
    PROTOCOL_VERSION,
    Command,
    Job,
    Keys,
    Worker,
    WorkerState,
    content_mark,
    priority_of,
    ready_score,
)
from valohai_dagster.executions.memory import Recent
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.stream import EventKind, FollowEvent

FOLLOW_LENGTH = 2_000  # entries kept per execution
FOLLOW_SECONDS = 24 * 3600
GRANT_SECONDS = 120  # an uncollected grant vanishes after this long
COMMAND_SECONDS = 24 * 3600
SEAL_SECONDS = 60  # longer than the call that ends a machine takes
LIVE_LOG_SECONDS = 3600  # how long a live log outlives its execution; the stored one stays
REMEMBERED = 10_000  # executions
CHUNK = 100  # executions that one command asks about


@dataclass(frozen=True, kw_only=True)
class QueueEntry:
    """A job for its group's queue. `force`: it replaces an earlier attempt; `front`: it goes before all that waits."""

    job: Job
    priority: int = 0
    front: bool = False
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class LeaseFacts:
    token: str
    public_key: str


class Dispatch:
    def __init__(self, broker: aioredis.Redis, keys: Keys) -> None:
        self.redis = broker
        self.keys = keys
        self._put_off: Recent[float] = Recent(REMEMBERED)

    async def enqueue(self, *entries: QueueEntry) -> list[int | None]:
        """Puts jobs into their groups' queues and wakes agents, all in one round trip.

        For each, how many are ahead of it; None if that attempt is known already.
        """
        async with self.redis.pipeline(transaction=False) as pipe:
            for entry in entries:
                self._enqueue(pipe, entry)
            answers: Any = await pipe.execute()
        return [rank if added else None for added, rank in answers]

    def _enqueue(self, pipe: Any, entry: QueueEntry) -> None:
        keys, job = self.keys, entry.job
        group, exec_id = job.group, job.execution_id
        base = ready_score(0, priority=entry.priority, front=entry.front)
        pipe.execute_command(
            *("FCALL", "vh1_enqueue", 5),
            *(keys.ready(group), keys.job(group, exec_id), keys.lease(group, exec_id)),
            *(keys.sequence(group), keys.bell(group)),
            *(exec_id, job.model_dump_json(), job.attempt, PROTOCOL_VERSION),
            *(int(base), "1" if entry.force else "0", input_marks(job)),
        )

    async def withdraw(self, group: str, execution_id: str) -> bool:
        """Takes a waiting job out of the queue; False when a worker has it already."""
        ready, lease = self.keys.ready(group), self.keys.lease(group, execution_id)
        return bool(await self.redis.fcall("vh1_withdraw", 2, ready, lease, execution_id))

    async def known_attempt(self, group: str, execution_id: str) -> int:
        """The attempt that was queued last; 0 if none was."""
        attempt: Any = await self.redis.hget(self.keys.job(group, execution_id), "attempt")
        return int(attempt or 0)

    async def position(self, group: str, execution_id: str) -> int | None:
        """How many jobs are ahead; None when it does not wait."""
        rank: Any = await self.redis.zrank(self.keys.ready(group), execution_id)
        return rank

    async def positions(self, group: str, execution_ids: Sequence[str]) -> list[int | None]:
        """The same for several."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for execution_id in execution_ids:
                pipe.zrank(self.keys.ready(group), execution_id)
            ranks: Any = await pipe.execute() if execution_ids else []
        return ranks

    async def waiting(self, group: str) -> int:
        return await self.redis.zcard(self.keys.ready(group))

    async def waiting_by_priority(self, group: str) -> dict[int, int]:
        """How many jobs wait, by priority (those that go before all others count with their own)."""
        ready = self.keys.ready(group)
        found: dict[int, int] = defaultdict(int)
        after: float | str = "-inf"
        while first := await self._first_beyond(ready, after):
            priority, after = priority_of(first)
            found[priority] += int(await self.redis.zcount(ready, first, f"({after}"))
        return dict(found)

    async def _first_beyond(self, ready: str, score: float | str) -> float | None:
        entries: Any = await self.redis.zrange(
            ready, score, "+inf", byscore=True, offset=0, num=1, withscores=True
        )
        return entries[0][1] if entries else None

    async def leases(self, items: Iterable[tuple[str, str]]) -> dict[str, LeaseFacts]:
        """Token and public key of the live leases among these (group, execution) pairs."""
        items = list(items)
        if not items:
            return {}
        async with self.redis.pipeline(transaction=False) as pipe:
            for group, execution_id in items:
                pipe.hmget(self.keys.lease(group, execution_id), "token", "public_key")
            answers: Any = await pipe.execute()
        return {
            execution_id: LeaseFacts(token=token, public_key=public_key)
            for (_, execution_id), (token, public_key) in zip(items, answers, strict=True)
            if token and public_key
        }

    async def leased(self, items: Iterable[tuple[str, str]]) -> set[str]:
        """The executions among these (group, execution) pairs whose lease is alive.

        Most are: whole chunks are asked for at once, and only where one is missing each of them.
        """
        by_group = _by_group(items)
        chunks = [(g, ids[i : i + CHUNK]) for g, ids in by_group for i in range(0, len(ids), CHUNK)]
        async with self.redis.pipeline(transaction=False) as pipe:
            for group, ids in chunks:
                pipe.exists(*(self.keys.lease(group, execution_id) for execution_id in ids))
            counts: Any = await pipe.execute() if chunks else []
            alive = {
                execution_id
                for (_, ids), count in zip(chunks, counts, strict=True)
                if count == len(ids)
                for execution_id in ids
            }
            unsure = [
                (group, execution_id)
                for (group, ids), count in zip(chunks, counts, strict=True)
                if count < len(ids)
                for execution_id in ids
            ]
            for group, execution_id in unsure:
                pipe.exists(self.keys.lease(group, execution_id))
            found: Any = await pipe.execute() if unsure else []
        return alive | {item[1] for item, there in zip(unsure, found, strict=True) if there}

    async def queued(self, items: Iterable[tuple[str, str]]) -> set[str]:
        """The executions among these (group, execution) pairs that wait in their queue."""
        by_group = _by_group(items)
        chunks = [(g, ids[i : i + CHUNK]) for g, ids in by_group for i in range(0, len(ids), CHUNK)]
        async with self.redis.pipeline(transaction=False) as pipe:
            for group, ids in chunks:
                pipe.execute_command("ZMSCORE", self.keys.ready(group), *ids)
            answers: Any = await pipe.execute() if chunks else []
        return {
            execution_id
            for (_, ids), scores in zip(chunks, answers, strict=True)
            for execution_id, score in zip(ids, scores, strict=True)
            if score is not None
        }

    async def drop_lease(self, group: str, execution_id: str) -> None:
        await self.redis.delete(self.keys.lease(group, execution_id))

    async def deliver(self, outbox: Outbox) -> None:
        """Says all of it in one round trip. The server works in order: what is deleted from a stream last has been
        answered before.
        """
        async with self.redis.pipeline(transaction=False) as pipe:
            for execution_id, events in outbox.events:
                self._publish(pipe, execution_id, events)
            for group, execution_id, sealed in outbox.grants:
                self._push_grants(pipe, group, execution_id, sealed)
            for group, worker, command in outbox.commands:
                self._command(pipe, group, worker, command)
            for group, execution_id, attempt in outbox.ended:
                self._forget(pipe, group, execution_id, attempt)
            for stream, entry in outbox.posts:
                pipe.xadd(stream, entry)
            for stream, entries in outbox.handled.items():
                pipe.xdel(stream, *entries)
            await pipe.execute()

    def _publish(self, pipe: Any, execution_id: str, events: Iterable[FollowEvent]) -> None:
        stream = self.keys.follow(execution_id)
        for event in events:
            entry = ("e", event.model_dump_json())
            pipe.execute_command("XADD", stream, "MAXLEN", "~", FOLLOW_LENGTH, "*", *entry)
        if self._is_to_be_put_off(execution_id, events):
            pipe.expire(stream, FOLLOW_SECONDS)

    def _is_to_be_put_off(self, execution_id: str, events: Iterable[FollowEvent]) -> bool:
        """Whether the stream's end has to be set anew: not with every event, but surely with the last one."""
        now, last = time.monotonic(), self._put_off.get(execution_id)
        final = any(event.kind is EventKind.final for event in events)
        if not final and last is not None and now - last < FOLLOW_SECONDS / 24:
            return False
        self._put_off.put(execution_id, now)
        return True

    async def seal(self, group: str, machine_id: str) -> bool:
        """From now on workers of the machine take no job, for a minute; False if one is there that may have taken some.

        Taking a job and looking for the seal is one step of the server's, so nothing comes in between.
        """
        key = self.keys.sealed(group, machine_id)
        await self.redis.set(key, "1", ex=SEAL_SECONDS)
        there = [
            one for one in (await self.workers(group)).values() if one.machine_id == machine_id
        ]
        if any(one.busy or one.state is not WorkerState.draining for one in there):
            await self.redis.delete(key)
            return False
        return True

    def _push_grants(self, pipe: Any, group: str, execution_id: str, sealed: bytes) -> None:
        stream = self.keys.grant(group, execution_id)
        pipe.xadd(stream, {"g": sealed}, maxlen=1000)
        pipe.expire(stream, GRANT_SECONDS)

    def _command(self, pipe: Any, group: str, worker: str, command: Command) -> None:
        stream = self.keys.command(group, worker)
        pipe.xadd(stream, {"c": command.model_dump_json()}, maxlen=1000)
        pipe.expire(stream, COMMAND_SECONDS)

    def _forget(self, pipe: Any, group: str, execution_id: str, attempt: int) -> None:
        """Removes an ended execution's keys; its live log stays readable for a while."""
        keys = self.keys
        pipe.zrem(keys.ready(group), execution_id)
        pipe.hdel(keys.passed(group), execution_id)
        pipe.delete(
            keys.job(group, execution_id),
            keys.lease(group, execution_id),
            keys.grant(group, execution_id),
        )
        pipe.expire(keys.log(group, execution_id, attempt), LIVE_LOG_SECONDS)

    async def read_streams(self, streams: Iterable[str], *, count: int, block_ms: int) -> Any:
        """What waits at the start of the streams, as (stream, entries) pairs; waits for something to come."""
        reply: Any = await self.redis.xread(
            dict.fromkeys(streams, "0-0"), count=count, block=block_ms
        )
        return reply or []

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


def input_marks(job: Job) -> str:
    """What the queue compares with the caches of workers: marks and sizes of the job's largest inputs."""
    sizes = (
        (file.size, name)
        for item in job.inputs
        if item.download == "always"
        for file in item.files
        if file.size and (name := file.content_name)
    )
    packages = ((one.size, f"sha256:{one.checksums.sha256}") for one in job.packages)
    largest = heapq.nlargest(MAX_INPUT_MARKS, chain(packages, sizes))
    return ",".join(f"{content_mark(name)} {size}" for size, name in largest)


def _by_group(items: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for group, execution_id in items:
        groups[group].append(execution_id)
    return list(groups.items())


def _worker(fields: Mapping[str, Any], group: str) -> Worker | None:
    if "name" not in fields or "incarnation" not in fields:
        return None
    return Worker.model_validate({"group": group, **fields})
