"""Whether the planner and the reconciler leak machines, end busy ones or lose work, and what their machines cost.

Seeded worlds with bursts of work, capacity droughts, spot storms, API outages and throttling, lists that lag, answers
that get lost, machines that never register, partitions, crashes, and conductors that die between any two calls; the
planner, the reconciler and its book are the real ones, time is simulated. At the end each group is disabled, and then
nothing may be left. Beside them in the same worlds:

    naive   as many machines as wait and run, by the cloud's list, with no memory; which busy machine ends is chance
    ideal   knows when each job comes, is never refused, boots machines in advance, keeps none idle that could pay off

    leaked           machines that nothing will ever end
    busy terminated  machines that were ended with work on them
    lost             jobs that never finished
    twice            jobs given away while their worker, cut off, computed on; its result does not count
    over_maximum     machines above a group's maximum for some seconds, where lists are a minute old and answers get lost
    cost             price of all machines; one on demand is 1 an hour, a spot machine 0.3

`planner_tick_ms` is the planner with 10,000 jobs and 1,000 machines; `enqueue_to_cloud_call_s` is from a client's submit to
the call that launches a machine, with a real execution service and real Redis: with the driver of AWS until LaunchInstances
arrives at moto (which answers at once, as AWS does not; the longest is the first, for which the SDK is loaded and the Auto
Scaling group is made), and `simulated_...` until the simulated cloud's driver is asked.

    python -m bench.capacity [--scenarios N] [--first SEED] [--processes N] [--quick]

The last line is JSON: scenarios, leaked, busy_terminated, lost, cost_over_ideal, wait_p95_s, planner_tick_ms,
enqueue_to_cloud_call_s and more. The exit code is 1 when anything was leaked, lost or ended while busy, or machines that
are always kept were not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context

from rich.console import Console
from rich.table import Table

from bench import enqueue
from valohai_dagster.capacity.model import Machine, Policy, Seat, View
from valohai_dagster.capacity.planner import plan
from valohai_dagster.capacity.simulation.scenario import START, scenario
from valohai_dagster.capacity.simulation.world import Result, World
from valohai_dagster.capacity.simulation.yardsticks import Ideal, ideal, naive

ROUNDS = 25


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One world, three times. `with_grace`: the ideal if it too had to keep idle machines for the group's grace."""

    seed: int
    features: tuple[str, ...]
    ours: Result
    naive: Result
    ideal: Ideal
    with_grace: Ideal

    @property
    def bad(self) -> bool:
        ours = self.ours
        return bool(ours.leaked or ours.lost or ours.busy_terminated or ours.below_minimum)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenarios", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small, to see it work")
    given = parser.parse_args()
    number, rounds = (20, 3) if given.quick else (given.scenarios, ROUNDS)
    began = time.perf_counter()
    seeds = range(given.first, given.first + number)
    with get_context("spawn").Pool(given.processes) as pool:
        found = sorted(pool.imap_unordered(compare, seeds, chunksize=5), key=lambda one: one.seed)
    seconds = time.perf_counter() - began
    tick = planner_tick()
    calls, simulated = enqueue.to_aws(rounds), enqueue.to_simulated(rounds)
    report(found)
    for one in found:
        if one.bad or one.ours.over_maximum > 0:
            print(f"seed {one.seed}: {one.ours} in {', '.join(one.features)}")
    print(json.dumps({**figures(found, tick, calls, simulated), "seconds": round(seconds, 1)}))
    if any(one.bad for one in found):
        sys.exit(1)


def compare(seed: int) -> Compared:
    world = scenario(seed)
    grace = world.policy.grace.total_seconds()
    return Compared(
        seed=seed,
        features=world.features,
        ours=World(world).run(),
        naive=World(world, naive).run(),
        ideal=ideal(world),
        with_grace=ideal(world, grace=grace),
    )


# -- the planner alone -------------------------------------------------------------------------------------------------


def planner_tick() -> float:
    """Median of milliseconds."""
    names = [f"m{number}" for number in range(1000)]
    now = START + timedelta(hours=1)
    view = View(
        waiting={0: 9_000, 1: 1_000},
        machines=tuple(
            Machine(id=name, zone="abc"[number % 3], created_at=START)
            for number, name in enumerate(names)
        ),
        seats=tuple(
            Seat(worker=name, machine_id=name, busy=number % 10 != 0, idle_since=START, seen_at=now)
            for number, name in enumerate(names)
        ),
        registered=frozenset(names),
        last_seen=dict.fromkeys(names, now),
        listed_at=now,
    )
    policy = Policy(max_machines=5_000, zones=("a", "b", "c"))
    times = []
    for _ in range(20):
        began = time.perf_counter()
        decided = plan(view, policy, now)
        times.append((time.perf_counter() - began) * 1000)
        assert sum(action.count for action in decided.actions) == 4_000
    return statistics.median(times)


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(
    found: Sequence[Compared], tick: float, calls: Sequence[float], simulated: Sequence[float]
) -> dict[str, float | int]:
    ours = [one.ours for one in found]
    ideals = sum(one.ideal.cost for one in found)
    more = [b - a for one in found for a, b in zip(one.ideal.waits, one.ours.waits, strict=True)]
    return {
        "scenarios": len(found),
        "leaked": sum(one.leaked for one in ours),
        "busy_terminated": sum(one.busy_terminated for one in ours),
        "lost": sum(one.lost for one in ours),
        "cost_over_ideal": round(sum(one.cost for one in ours) / ideals, 3),
        "wait_p95_s": round(p95(wait for one in ours for wait in one.waits), 1),
        "planner_tick_ms": round(tick, 1),
        "enqueue_to_cloud_call_s": round(statistics.median(calls), 3),
        "enqueue_to_cloud_call_p95_s": round(p95(calls), 3),
        "enqueue_to_cloud_call_max_s": round(max(calls), 3),
        "simulated_enqueue_to_cloud_call_s": round(statistics.median(simulated), 3),
        "simulated_enqueue_to_cloud_call_p95_s": round(p95(simulated), 3),
        "cost_over_ideal_with_grace": round(
            sum(one.cost for one in ours) / sum(one.with_grace.cost for one in found), 3
        ),
        "wait_over_ideal_p50_s": round(statistics.median(more), 1),
        "wait_over_ideal_p95_s": round(p95(more), 1),
        "over_maximum": sum(max(0, one.over_maximum) for one in ours),
        "below_minimum": sum(one.below_minimum for one in ours),
        "jobs": sum(len(one.waits) for one in ours),
        "machines": sum(one.machines for one in ours),
        "conductor_deaths": sum(one.deaths for one in ours),
        "naive_leaked": sum(one.naive.leaked for one in found),
        "naive_busy_terminated": sum(one.naive.busy_terminated for one in found),
        "naive_lost": sum(one.naive.lost for one in found),
        "naive_cost_over_ideal": round(sum(one.naive.cost for one in found) / ideals, 3),
    }


def p95(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[int(len(ordered) * 0.95)] if ordered else 0.0


def report(found: Sequence[Compared]) -> None:
    console = Console()
    columns = ("leaked", "busy terminated", "lost", "twice", "machines", "cost", "wait p95, s")
    table = Table("", *columns, title=f"{len(found)} worlds")
    for name, results in (("ours", [o.ours for o in found]), ("naive", [o.naive for o in found])):
        table.add_row(name, *_row(results))
    for name, ones in (
        ("ideal", [one.ideal for one in found]),
        ("ideal with grace", [one.with_grace for one in found]),
    ):
        waits = p95(wait for one in ones for wait in one.waits)
        cost = sum(one.cost for one in ones)
        table.add_row(name, *("",) * 5, f"{cost:.0f}", f"{waits:.0f}")
    console.print(table)
    worlds = Table("worlds with", "number", "leaked", "busy terminated", "lost", "cost over ideal")
    for name, number in Counter(name for one in found for name in one.features).most_common():
        those = [one for one in found if name in one.features]
        ours = [one.ours for one in those]
        ratio = sum(one.cost for one in ours) / sum(one.ideal.cost for one in those)
        counts = (sum(getattr(o, k) for o in ours) for k in ("leaked", "busy_terminated", "lost"))
        worlds.add_row(name, str(number), *map(str, counts), f"{ratio:.2f}")
    console.print(worlds)


def _row(results: Sequence[Result]) -> list[str]:
    return [
        str(sum(one.leaked for one in results)),
        str(sum(one.busy_terminated for one in results)),
        str(sum(one.lost for one in results)),
        str(sum(one.doubled for one in results)),
        str(sum(one.machines for one in results)),
        f"{sum(one.cost for one in results):.0f}",
        f"{p95(wait for one in results for wait in one.waits):.0f}",
    ]


if __name__ == "__main__":
    main()
