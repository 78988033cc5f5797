"""What the queue and the workers of a group are like, as the planner wants to know it. Keeps what only time tells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from valohai_agent.protocol import Worker, WorkerState
from valohai_dagster.capacity.model import Seat

# A worker that begins to drain may just be getting a job that it took before: not believed to be idle at once.
SETTLE = timedelta(seconds=5)
UPDATE_PAUSE = timedelta(
    minutes=10
)  # before a worker that is still of another version is told again


@dataclass(frozen=True, kw_only=True)
class Running:
    """An execution that has a worker by the records: nobody else has been given it."""

    worker: str
    machine_id: str
    since: datetime


class Seats:
    """One group's workers over time. Since when one is idle is counted from when it was first seen so."""

    def __init__(self) -> None:
        self._last: dict[str, Seat] = {}  # of each worker that was seen
        self._idle: dict[tuple[str, str], datetime] = {}
        self._draining: dict[tuple[str, str], datetime] = {}
        self._machines: dict[str, set[str]] = defaultdict(set)  # machine -> workers ever seen on it

    def look(
        self,
        workers: Collection[Worker],
        now: datetime,
        *,
        outdated: Collection[str] = (),
        running: Collection[Running] = (),
    ) -> tuple[Seat, ...]:
        """`outdated`: names of those whose agent is of an old version. `running`: what the group's workers have to do; one
        that has fallen silent with work is busy until that is another's."""
        here = {(one.name, one.incarnation) for one in workers}
        self._idle = {key: since for key, since in self._idle.items() if key in here}
        self._draining = {key: since for key, since in self._draining.items() if key in here}
        seats = {one.name: self._seat(one, now, one.name in outdated) for one in workers}
        for one in running:
            if one.worker not in seats and (silent := self._silent(one, running)):
                seats[one.worker] = silent
        self._last = seats
        return tuple(seats.values())

    def _silent(self, one: Running, running: Collection[Running]) -> Seat | None:
        busy = sum(other.worker == one.worker for other in running)
        last = self._last.get(one.worker)
        if last is None or one.machine_id not in ("", last.machine_id):
            if not one.machine_id:
                return None
            last = Seat(worker=one.worker, machine_id=one.machine_id, slots=busy, seen_at=one.since)
        return replace(last, busy=busy, idle_since=None)

    def _seat(self, worker: Worker, now: datetime, outdated: bool) -> Seat:
        key = (worker.name, worker.incarnation)
        busy, draining = worker.busy, worker.state is WorkerState.draining
        if worker.machine_id:
            self._machines[worker.machine_id].add(worker.name)
        if draining and now - self._draining.setdefault(key, now) < SETTLE:
            busy = max(1, busy)
        if busy:
            self._idle.pop(key, None)
        else:
            self._idle.setdefault(key, now)
        return Seat(
            worker=worker.name,
            machine_id=worker.machine_id,
            slots=worker.slots,
            busy=busy,
            draining=draining,
            outdated=outdated,
            idle_since=self._idle.get(key),
            seen_at=now,
        )

    def workers_on(self, machine_id: str) -> set[str]:
        """Names of all workers that were ever seen on the machine."""
        return set(self._machines.get(machine_id, ()))

    def forget(self, machine_id: str) -> None:
        self._machines.pop(machine_id, None)


class Updates:
    """Which worker is to make way for the published agent: idle ones, one after another."""

    def __init__(self) -> None:
        self._told: dict[str, datetime] = {}

    def next(
        self, workers: Collection[Worker], version: str, now: datetime, *, outdated: Collection[str]
    ) -> str | None:
        """`version`: of the published agent. `outdated`: those that cannot be updated; their machines are replaced."""
        self._told = {name: at for name, at in self._told.items() if now - at < UPDATE_PAUSE}
        if any(one.state is WorkerState.draining for one in workers):
            return None
        able = (
            one.name
            for one in workers
            if one.version != version
            and one.supervised
            and one.state is WorkerState.idle
            and one.busy == 0
            and one.name not in self._told
            and one.name not in outdated
        )
        found = min(able, default=None)
        if found is not None:
            self._told[found] = now
        return found


def fingerprint(waiting: Mapping[int, int], workers: Collection[Worker]) -> tuple[object, ...]:
    """Changes whenever something has happened that the planner should know at once."""
    return (
        sum(waiting.values()),
        frozenset((one.name, one.incarnation, one.busy, one.state, one.slots) for one in workers),
    )
