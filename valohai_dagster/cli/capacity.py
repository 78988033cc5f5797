"""What `groups` and `machines` share: the records, and as much of Redis as answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import redis

from valohai_agent.protocol import Keys, Worker
from valohai_dagster.broker.connection import broker_url, make_client
from valohai_dagster.embedded.conductor import running_conductor
from valohai_dagster.errors import RefusedError, ValohaiError
from valohai_dagster.executions.capacity_state import CapacityState, kick, read_state
from valohai_dagster.executions.why_reader import workers_of
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings, load_settings
from valohai_dagster.settings_groups import AnyGroupSettings


@dataclass(frozen=True, kw_only=True)
class Live:
    """What Redis knows of one group; nothing of it while Redis is away."""

    waiting: int | None = None
    workers: tuple[Worker, ...] = ()
    state: CapacityState | None = None
    away: str | None = None  # why nothing is known

    def busy(self, machine_id: str) -> int | None:
        """Executions on the machine; None when no worker of it has checked in."""
        there = [one.busy for one in self.workers if one.machine_id == machine_id]
        return sum(there) if there else None


class Deployment:
    """Starts nothing: a Redis that is away is part of the answer."""

    def __init__(self, settings: Settings, records: Records) -> None:
        self.settings = settings
        self.records = records
        self._keys = Keys(records.deployment_id)
        self._client = make_client(broker_url(settings))

    def close(self) -> None:
        self._client.close()
        self.records.close()

    def group(self, name: str) -> AnyGroupSettings:
        """As the file has it. Raises RefusedError when there is none of that name."""
        try:
            return self.settings.groups[name]
        except KeyError:
            known = ", ".join(sorted(self.settings.groups))
            text = f"there is no worker group {name!r}; valohai.toml has: {known}"
            raise RefusedError(text) from None

    def live(self, group: str) -> Live:
        client, keys = self._client, self._keys
        try:
            waiting: int = client.zcard(keys.ready(group))
            return Live(
                waiting=waiting,
                workers=workers_of(client, keys, group),
                state=read_state(client, keys, group),
            )
        except (redis.RedisError, OSError, ValohaiError) as error:
            return Live(away=str(error))

    def is_asleep(self) -> bool:
        """Whether nothing runs that the next execution would not start."""
        on_demand = self.settings.redis_url is None or self.settings.start_conductor
        return on_demand and running_conductor(self.settings) is None

    def kick(self, group: str) -> bool:
        """Has the group looked at now, holds forgotten; False when Redis is away."""
        try:
            kick(self._client, self._keys, group, retry=True)
        except (redis.RedisError, OSError, ValohaiError):
            return False
        return True


@contextmanager
def deployment() -> Iterator[Deployment]:
    """That of the settings in use."""
    settings = load_settings()
    found = Deployment(settings, open_records(settings))
    try:
        yield found
    finally:
        found.close()
