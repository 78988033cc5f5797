"""Steps that wait for a slot of a pool: one look per pool and second, however many wait."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from dagster import DagsterInstance

from valohai_dagster.plugin.compat.storage import is_database_outage
from valohai_dagster.plugin.driver.lanes import InstanceGone, LaneClosed, Lanes

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class Waiting(Protocol):
    """A run with steps that wait."""

    run_id: str

    @property
    def instance(self) -> DagsterInstance: ...

    def wake(self) -> None: ...


class Pools:
    """Wakes the runs whose waiting steps were given a slot, so that they claim it."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._waiting: dict[str, set[Waiting]] = {}  # pool -> runs with a step that waits for it

    def expect(self, run: Waiting, pools: set[str]) -> None:
        """The pools that the run waits for from now on."""
        for pool in set(self._waiting) | pools:
            runs = self._waiting.setdefault(pool, set())
            runs.add(run) if pool in pools else runs.discard(run)
            if not runs:
                del self._waiting[pool]

    def forget(self, run: Waiting) -> None:
        self.expect(run, set())

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for pool in list(self._waiting):
                await self._look(pool)

    async def _look(self, pool: str) -> None:
        by_instance: dict[int, tuple[DagsterInstance, list[Waiting]]] = {}
        for run in self._waiting.get(pool, ()):
            by_instance.setdefault(id(run.instance), (run.instance, []))[1].append(run)
        for instance, runs in by_instance.values():
            try:
                given = await self._lanes.run(pool, lambda i=instance: _given(i, pool), instance)
            except LaneClosed:
                return
            except InstanceGone:
                given = None  # the runs that wake up notice
            for run in runs:
                if given is None or run.run_id in given:
                    run.wake()


def _given(instance: DagsterInstance, pool: str) -> set[str] | None:
    """Runs with a waiting step that has a slot assigned; None when the pool has no limit any more."""
    try:
        info = instance.event_log_storage.get_concurrency_info(pool)
    except Exception as error:
        if is_database_outage(error):
            raise
        log.warning("pool %s cannot be read: %s", pool, error, extra={"action": "pool"})
        return set()
    if info.limit is None:
        return None
    return {step.run_id for step in info.pending_steps if step.assigned_timestamp is not None}
