"""What is read of the conductor and of Redis at each scrape."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

import redis

from valohai_agent.protocol import Worker, WorkerState
from valohai_dagster.capacity.standing import STATES
from valohai_dagster.executions.stream import ExecutionStatus
from valohai_dagster.observability.prometheus import Reading

log = logging.getLogger(__name__)

REDIS_SECONDS = 3.0  # a scrape does not wait longer for it


class Unfinished(Protocol):
    """An execution in the service's memory."""

    @property
    def status(self) -> ExecutionStatus: ...

    @property
    def group(self) -> str: ...


class Queues(Protocol):
    """The service's hands on Redis, as far as they are needed here."""

    async def waiting(self, group: str) -> int: ...

    async def workers(self, group: str) -> dict[str, Worker]: ...


class Lanes(Protocol):
    """Where the run driver's events are written."""

    @property
    def backlog(self) -> int: ...

    @property
    def written(self) -> int: ...


class Driven(Protocol):
    """The run driver."""

    @property
    def driven(self) -> int: ...

    @property
    def lanes(self) -> Lanes: ...


class Machines(Protocol):
    """How the machines of a group stood at the last look."""

    @property
    def states(self) -> Mapping[str, int]: ...

    @property
    def max_machines(self) -> int: ...

    @property
    def refused(self) -> bool: ...


class Conductor(Protocol):
    """Everything that is read."""

    @property
    def groups(self) -> Collection[str]: ...

    @property
    def queues(self) -> Queues: ...

    @property
    def shards_held(self) -> int: ...

    @property
    def driver(self) -> Driven | None: ...

    def unfinished(self) -> Collection[Unfinished]: ...

    def machines(self) -> Mapping[str, Machines]:
        """By group, of those that this conductor looks after."""
        ...


async def readings(conductor: Conductor) -> list[Reading]:
    """Values of this conductor; queues and workers are the deployment's, so every conductor tells the same of them."""
    found = [
        *_executions(conductor.unfinished()),
        *_driver(conductor.driver),
        *_machines(conductor.machines()),
    ]
    found.append(
        Reading(
            name="shards_held",
            help="Shards that this conductor looks after.",
            value=conductor.shards_held,
        )
    )
    up = 1.0
    try:
        found += await asyncio.wait_for(_groups(conductor), REDIS_SECONDS)
    except (redis.RedisError, asyncio.TimeoutError) as error:
        log.debug("a scrape found no Redis: %s", error)
        up = 0.0
    text = "1 when Redis answers this conductor; its queues and workers are unknown otherwise."
    return [*found, Reading(name="redis_up", help=text, value=up)]


def _executions(unfinished: Collection[Unfinished]) -> Iterator[Reading]:
    counts = Counter((one.status.value, one.group) for one in unfinished)
    for (status, group), number in sorted(counts.items()):
        yield Reading(
            name="executions",
            help="Unfinished executions of this conductor's shards.",
            value=number,
            labels={"status": status, "group": group},
        )


def _driver(driver: Driven | None) -> Iterator[Reading]:
    if driver is None:
        return
    yield Reading(
        name="runs_in_flight", help="Dagster runs that this conductor drives.", value=driver.driven
    )
    yield Reading(
        name="lane_backlog",
        help="Calls to Dagster's storage that wait or run in the lanes.",
        value=driver.lanes.backlog,
    )
    yield Reading(
        name="events_written",
        help="Events written into Dagster's log.",
        value=driver.lanes.written,
        counter=True,
    )


def _machines(groups: Mapping[str, Machines]) -> Iterator[Reading]:
    for group, found in sorted(groups.items()):
        for state in STATES:
            if state != "gone":
                yield Reading(
                    name="machines",
                    help="Machines of groups that this conductor looks after.",
                    value=found.states.get(state, 0),
                    labels={"group": group, "state": state},
                )
        yield Reading(
            name="machines_max",
            help="Machines that a group may have.",
            value=found.max_machines,
            labels={"group": group},
        )
        yield Reading(
            name="machines_refused",
            help="1 while machines that a group needs do not come, whatever the reason.",
            value=float(found.refused),
            labels={"group": group},
        )


async def _groups(conductor: Conductor) -> list[Reading]:
    found: list[Reading] = []
    for group in sorted(conductor.groups):
        waiting = await conductor.queues.waiting(group)
        text = "Executions that wait in the queue of a group."
        labels = {"group": group}
        found.append(Reading(name="queue_depth", help=text, value=waiting, labels=labels))
        found += _workers(group, await conductor.queues.workers(group))
    return found


def _workers(group: str, workers: Mapping[str, Worker]) -> Iterator[Reading]:
    states = Counter(worker.state for worker in workers.values())
    for state in WorkerState:
        yield Reading(
            name="workers",
            help="Workers that have checked in.",
            value=states[state],
            labels={"group": group, "state": state.value},
        )
    serving = [w for w in workers.values() if w.state is not WorkerState.draining]
    for use, number in (
        ("busy", sum(w.busy for w in serving)),
        ("all", sum(w.slots for w in serving)),
    ):
        yield Reading(
            name="worker_slots",
            help="Slots of workers that do not drain.",
            value=number,
            labels={"group": group, "use": use},
        )
