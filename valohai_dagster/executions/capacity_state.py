"""How a group's machines stand, in Redis for everybody who explains a wait; and the bell that has them looked at.

Whoever looks after a group writes it at each look. It expires when nobody does any more.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import redis
import redis.asyncio as aioredis
from pydantic import BaseModel, ConfigDict, ValidationError

from valohai_agent.protocol import Keys
from valohai_dagster.capacity.holds import gist

STATE_SECONDS = 120
KICKS_KEPT = 1_000


class CapacityState(BaseModel):
    """`trouble`: why machines that are needed do not come, None while all is well. `starting`: machines asked for or
    booting, whose agent has not checked in; `starting_since`: the first of them. `states`: machines that are there by
    the word for how they stand."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    at: datetime
    summary: str = ""
    trouble: str | None = None
    starting: int = 0
    starting_since: datetime | None = None
    up: int = 0
    stopped: int = 0
    states: dict[str, int] = {}
    max_machines: int = 0
    enabled: bool = True
    looked_after_by: str = ""

    @property
    def full(self) -> bool:
        """Whether the group has as many machines as it may have."""
        return self.starting + self.up >= self.max_machines

    @property
    def refused(self) -> bool:
        """Whether machines are needed and do not come, though the group may have them."""
        return self.trouble is not None and not self.full

    @property
    def gist(self) -> str | None:
        """The trouble without times and ids of requests: while it is the same, nobody is told again."""
        return gist(self.trouble) if self.trouble else None


def parse(text: str | bytes | None) -> CapacityState | None:
    """None for what is not there and for what another version wrote."""
    try:
        return CapacityState.model_validate_json(text) if text else None
    except ValidationError:
        return None


def read_state(broker: redis.Redis, keys: Keys, group: str) -> CapacityState | None:
    text: Any = broker.get(keys.capacity(group))
    return parse(text)


async def states_of(
    broker: aioredis.Redis, keys: Keys, groups: list[str]
) -> dict[str, CapacityState]:
    """Of those groups that somebody has looked at lately."""
    if not groups:
        return {}
    texts: Any = await broker.mget([keys.capacity(group) for group in groups])
    found = {group: parse(text) for group, text in zip(groups, texts, strict=True)}
    return {group: state for group, state in found.items() if state is not None}


def kick(broker: redis.Redis, keys: Keys, group: str, *, retry: bool = False) -> None:
    """Has the group's machines looked at now, by whichever conductor looks after them.

    `retry`: what was refused is asked for again at once, since its cause may be gone.
    """
    entry: dict[Any, Any] = {"group": group, "retry": "1" if retry else ""}
    broker.xadd(keys.kicks(), entry, maxlen=KICKS_KEPT)
