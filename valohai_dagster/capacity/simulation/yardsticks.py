"""What the planner is compared with: one that knows the future, and one that knows no better than to count."""

from __future__ import annotations

import contextlib
import heapq
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from valohai_dagster.capacity.clouds.base import CloudError, Launch
from valohai_dagster.capacity.clouds.simulated_cloud import ALIVE
from valohai_dagster.capacity.look import Load, Outcome
from valohai_dagster.capacity.model import Machine, Policy, Purchase
from valohai_dagster.capacity.simulation.scenario import Scenario
from valohai_dagster.capacity.simulation.world import SPOT_PRICE, World


@dataclass(frozen=True, kw_only=True)
class Ideal:
    """Hours of machines, priced, and the time that each job waits."""

    cost: float
    waits: tuple[float, ...]


def ideal(scenario: Scenario, *, grace: float = 0.0) -> Ideal:
    """Knows when each job comes and how long it takes, never meets a refusal, and has machines booted in advance.

    Jobs are taken in order, each by the slot that was free last, up to the maximum. A machine pays for its boot, the time
    that it works, and each pause that is shorter than booting anew (with `grace`: than the grace, as ours has to wait).
    Machines that are always kept are paid for as long as there is work.
    """
    policy, boot = scenario.policy, sum(scenario.weather.boot) / 2
    slots = policy.slots * policy.max_machines
    spare, free, used = list(range(slots)), list[tuple[float, int]](), dict[int, list[_Span]]()
    waits, running = [], list[tuple[float, int]]()
    for work in sorted(scenario.work, key=lambda one: one.arrives):
        now = work.arrives
        while running and running[0][0] <= now:
            end, slot = heapq.heappop(running)
            free.append((end, slot))
        if not free and not spare and running:
            now, slot = heapq.heappop(running)
            free.append((now, slot))
        slot = free.pop(free.index(max(free)))[1] if free else spare.pop(0)
        waits.append(now - work.arrives)
        used.setdefault(slot // policy.slots, []).append(_Span(now, now + work.lasts))
        heapq.heappush(running, (now + work.lasts, slot))
    seconds = sum(_paid(spans, boot, max(grace, boot), grace) for spans in used.values())
    last = max((span.end for spans in used.values() for span in spans), default=0.0)
    seconds = max(seconds, last * min(policy.min_machines, policy.max_machines))
    price = SPOT_PRICE if policy.spot else 1.0
    return Ideal(cost=seconds / 3600 * price, waits=tuple(waits))


@dataclass(frozen=True)
class _Span:
    start: float
    end: float


def _paid(spans: list[_Span], boot: float, pause: float, after: float) -> float:
    """Seconds of one machine. Pauses longer than `pause` are not paid, but booting again is."""
    total, end = 0.0, None
    for span in sorted(spans, key=lambda one: one.start):
        if end is None:
            total += boot
        elif span.start - end > pause:
            total += boot + after
        elif span.start > end:
            total += span.start - end
        begin = span.start if end is None else max(span.start, end)
        total += max(0.0, span.end - begin)
        end = span.end if end is None else max(end, span.end)
    return total + after


@dataclass
class Naive:
    """As many machines as wait and run, by the cloud's list; the newest go when there were too many for the grace.

    It remembers nothing, asks nobody, and believes what it is told.
    """

    driver: Any
    world: World
    _too_many_since: datetime | None = field(default=None)

    def step(self, load: Load, policy: Policy) -> Outcome:
        with contextlib.suppress(CloudError):
            self._scale(load, policy)
        return Outcome()

    def _scale(self, load: Load, policy: Policy) -> None:
        listed: list[Machine] = self.driver.list()
        alive = [one for one in listed if one.state in ALIVE]
        wanted = sum(load.waiting.values()) + sum(seat.busy for seat in load.seats)
        machines = max(-(-wanted // policy.slots), policy.min_machines)
        machines = min(machines, policy.max_machines) if policy.enabled else 0
        now = self.world.timeline.clock()
        if len(alive) < machines:
            token = f"{self.world.random.getrandbits(64):016x}"
            purchase = Purchase.spot if policy.spot else Purchase.on_demand
            zone = self.world.random.choice(policy.zones)
            count = machines - len(alive)
            self.driver.launch(Launch(token=token, count=count, zone=zone, purchase=purchase))
        if len(alive) <= machines:
            self._too_many_since = None
            return
        self._too_many_since = self._too_many_since or now
        if now - self._too_many_since >= policy.grace or not policy.enabled:
            newest = sorted(alive, key=lambda one: one.created_at, reverse=True)
            for one in newest[: len(alive) - machines]:
                self.driver.terminate(one.id)


def naive(driver: Any, book: Any, world: World) -> Naive:
    """Keeps no book."""
    return Naive(driver, world)
