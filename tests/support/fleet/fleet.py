"""The agents of a simulated fleet: they check in, take jobs, renew leases and hear commands."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import redis

from tests.support.fleet.attempt import LEASE_MS, Attempt, Fenced, Surroundings, job_of
from tests.support.fleet.calls import LONGEST_PAUSE_SECONDS, Calls
from tests.support.fleet.profile import Profile
from valohai_agent import protocol as p
from valohai_agent.redis_link import is_transient
from valohai_agent.sealing import new_private_key, public_key_of

log = logging.getLogger(__name__)

BELL_SECONDS = 1.0  # longest wait for the bell; the ready set decides
COMMAND_BLOCK_MS = 1_000
LOOK_SECONDS = 0.5  # how often leases and heartbeats are looked at
MOST_TAKES = 32  # of one round trip


@dataclass(kw_only=True)
class Agent:
    name: str
    slots: int
    incarnation: str = field(default_factory=lambda: secrets.token_hex(8))
    running: dict[str, Attempt] = field(default_factory=dict)  # by token
    draining: bool = False
    renewed_at: float = 0.0

    @property
    def free(self) -> int:
        return 0 if self.draining else self.slots - len(self.running)


class SimulatedFleet:
    """`run()` until cancelled. `counts` tells what happened, see `stats`."""

    def __init__(
        self,
        url: str,
        deployment: str,
        profile: Profile,
        *,
        group: str = "local",
        trace: Callable[[str, str | None, str, float], None] = lambda *facts: None,
    ) -> None:
        self.profile = profile
        self.counts: Counter[str] = Counter()
        self.let_end = asyncio.Event()
        self._calls = Calls(url, on_return=self._renew_at_once)
        self._keys = p.Keys(deployment)
        key = new_private_key()
        self._around = Surroundings(
            calls=self._calls,
            keys=self._keys,
            group=group,
            key=key,
            public_key=public_key_of(key),
            counts=self.counts,
            let_end=self.let_end,
            trace=trace,
        )
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()
        self._by_execution: Counter[str] = Counter()
        self._slot_free = asyncio.Event()
        self._playing: dict[str, asyncio.Task[None]] = {}  # by token
        mark = secrets.token_hex(3)
        share, rest = divmod(profile.slots, profile.agents)
        self.agents = [
            Agent(name=f"fleet-{mark}-{number}", slots=share + (number < rest))
            for number in range(profile.agents)
        ]

    async def run(self) -> None:
        loops = [self._calls.run(), self._keep_alive(), self._take_jobs(), self._hear_commands()]
        tasks = [asyncio.ensure_future(loop) for loop in loops]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in (*tasks, *self._playing.values()):
                task.cancel()
            await asyncio.gather(*tasks, *self._playing.values(), return_exceptions=True)
            await self._calls.redis.aclose()

    def stats(self) -> dict[str, Any]:
        """Totals since the start, and what is going on now."""
        attempts = [attempt for agent in self.agents for attempt in agent.running.values()]
        phases = Counter(attempt.phase for attempt in attempts)
        usage = os.times()
        return {
            **self.counts,
            "live": len(attempts),
            "phases": dict(phases),
            "calls": self._calls.made,
            "cpu_seconds": usage.user + usage.system,
        }

    # -- staying alive ----------------------------------------------------------------------------------------------
    async def _keep_alive(self) -> None:
        while True:
            now = time.monotonic()
            for agent in self.agents:
                if now - agent.renewed_at >= self.profile.renew_seconds:
                    agent.renewed_at = now
                    self._spawn(self._beat(agent))
                for attempt in agent.running.values():
                    if now - attempt.renewed_at >= self.profile.renew_seconds:
                        attempt.renewed_at = now
                        self._spawn(self._renew(attempt))
            await asyncio.sleep(LOOK_SECONDS)

    async def _beat(self, agent: Agent) -> None:
        fields = {
            "name": agent.name,
            "group": self._group,
            "host": "fleet",
            "version": "0",
            "protocol": p.PROTOCOL_VERSION,
            "protocol_min": p.MIN_PROTOCOL_VERSION,
            "runtime": "simulated",
            "slots": agent.slots,
            "busy": len(agent.running),
            "state": "draining" if agent.draining else "busy" if agent.running else "idle",
        }
        flat = [str(item) for pair in fields.items() for item in pair]
        keys = (self._keys.worker(self._group, agent.name),)
        arguments = (agent.incarnation, str(LEASE_MS), *flat)
        if not await self._calls.persist("vh1_heartbeat", keys, *arguments):
            self.counts["names_lost"] += 1

    async def _renew(self, attempt: Attempt) -> None:
        try:
            await attempt.renew()
        except Fenced:
            self._fence(attempt.token)

    # -- jobs -------------------------------------------------------------------------------------------------------
    async def _take_jobs(self) -> None:
        """As many takes at once as there seems to be work for."""
        wanted = 1
        while True:
            free = [agent for agent in self.agents if agent.free > 0]
            if not free:
                self._slot_free.clear()
                await self._slot_free.wait()
                continue
            chosen = _spread(free, self._pace(wanted))
            got = sum(await asyncio.gather(*(self._take(agent) for agent in chosen)))
            wanted = min(MOST_TAKES, wanted * 2) if got == len(chosen) else 1
            if not got:
                await self._wait_for_bell()
            elif self.profile.takes_per_second:
                await asyncio.sleep(got / self.profile.takes_per_second)

    def _pace(self, wanted: int) -> int:
        rate = self.profile.takes_per_second
        return wanted if rate is None else max(1, min(wanted, int(rate / 10)))

    async def _wait_for_bell(self) -> None:
        try:
            await self._calls.redis.blpop([self._keys.bell(self._group)], timeout=BELL_SECONDS)
        except (redis.RedisError, OSError) as error:
            await self._pause_after(error)

    async def _take(self, agent: Agent) -> bool:
        """After a broken connection nobody knows whether a job was taken: its lease expires, and it is queued again."""
        token, keys, group = secrets.token_hex(16), self._keys, self._group
        try:
            answer = await self._calls.function(
                "vh1_take",
                (keys.ready(group), keys.worker(group, agent.name)),
                *(keys.group_prefix(group), agent.name, agent.incarnation, token),
                *(self._around.public_key, str(LEASE_MS)),
                *(str(p.MIN_PROTOCOL_VERSION), str(p.PROTOCOL_VERSION)),
            )
        except (redis.RedisError, OSError) as error:
            self.counts["takes_unknown"] += 1
            await self._pause_after(error)
            return False
        if not answer:
            return False
        attempt = Attempt(
            self._around,
            self.profile,
            worker=agent.name,
            incarnation=agent.incarnation,
            token=token,
            execution_id=answer[0].decode(),
            number=int(answer[2]),
            job=job_of(answer[1]),
        )
        agent.running[token] = attempt
        self._playing[token] = asyncio.create_task(self._play(agent, attempt))
        return True

    async def _play(self, agent: Agent, attempt: Attempt) -> None:
        self.counts["taken"] += 1
        self._by_execution[attempt.execution_id] += 1
        if self._by_execution[attempt.execution_id] > 1:
            self.counts["overlaps"] += 1
        try:
            await attempt.play()
            self.counts["stopped" if attempt.stopped.is_set() else "finished"] += 1
        except (Fenced, asyncio.CancelledError):
            self.counts["fenced"] += 1
        except Exception:  # one broken execution must not end the fleet
            self.counts["broken"] += 1
            log.exception("attempt %d of %s", attempt.number, attempt.execution_id)
        finally:
            self._by_execution[attempt.execution_id] -= 1
            if not self._by_execution[attempt.execution_id]:
                del self._by_execution[attempt.execution_id]
            agent.running.pop(attempt.token, None)
            self._playing.pop(attempt.token, None)
            self._slot_free.set()

    def _fence(self, token: str) -> None:
        task = self._playing.get(token)
        if task is not None:
            task.cancel()

    # -- commands ---------------------------------------------------------------------------------------------------
    async def _hear_commands(self) -> None:
        last = {self._keys.command(self._group, agent.name): "0" for agent in self.agents}
        owners = {self._keys.command(self._group, agent.name): agent for agent in self.agents}
        while True:
            try:
                found = await self._calls.redis.xread(last, block=COMMAND_BLOCK_MS)
            except (redis.RedisError, OSError) as error:
                await self._pause_after(error)
                continue
            for stream, entries in found or []:
                for entry_id, fields in entries:
                    last[stream.decode()] = entry_id
                    command = p.Command.model_validate_json(fields[b"c"])
                    self._obey(owners[stream.decode()], command)

    def _obey(self, agent: Agent, command: p.Command) -> None:
        self.counts[f"heard_{command.kind}"] += 1
        if command.kind == "drain":
            agent.draining = True
        elif command.kind == "fence":
            self._fence(command.token or "")
        elif command.kind in ("stop", "stop-hard"):
            attempt = agent.running.get(command.token or "")
            if attempt is not None:
                attempt.stopped.set()

    # -- inside -----------------------------------------------------------------------------------------------------
    def _renew_at_once(self) -> None:
        """Redis was away, and may have come back empty."""
        for agent in self.agents:
            agent.renewed_at = 0.0
            for attempt in agent.running.values():
                attempt.renewed_at = 0.0

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pause_after(self, error: BaseException) -> None:
        if not is_transient(error):
            raise error
        await asyncio.sleep(LONGEST_PAUSE_SECONDS / 4)


def _spread(free: list[Agent], most: int) -> list[Agent]:
    """Who takes next: in turn, each at most as often as it has slots."""
    rounds = max(agent.free for agent in free)
    turns = (agent for number in range(rounds) for agent in free if agent.free > number)
    return list(itertools.islice(turns, most))
