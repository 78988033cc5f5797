"""The real planner and reconciler in made-up worlds; `make bench-capacity` runs a thousand of them (LESSONS 1, 3, 4)."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from valohai_dagster.capacity.clouds.simulated_cloud import Spell, Weather
from valohai_dagster.capacity.model import Policy
from valohai_dagster.capacity.simulation.scenario import Accident, Scenario, Work, at, scenario
from valohai_dagster.capacity.simulation.world import Result, World
from valohai_dagster.capacity.simulation.yardsticks import ideal, naive

CALM = Scenario(
    seed=1,
    policy=Policy(max_machines=4, grace=timedelta(minutes=5), bootstrap="1"),
    weather=Weather(boot=(60, 60)),
    work=tuple(Work(arrives=10.0 * number, lasts=300.0) for number in range(8)),
    hours=1.0,
)


def good(result: Result) -> bool:
    """Nothing leaked, nothing lost, nothing ended while it worked."""
    wrong = (result.leaked, result.lost, result.busy_terminated, max(0, result.over_maximum))
    return wrong == (0, 0, 0, 0) and not result.below_minimum


def changed(**values: Any) -> Result:
    return World(replace(CALM, **values)).run()


@pytest.mark.parametrize("seed", range(1000, 1030))
def test_nothing_is_leaked_or_lost_or_ended_while_busy(seed: int):
    result = World(scenario(seed)).run()
    assert good(result), result


def test_a_calm_world_costs_what_the_work_the_boot_and_the_grace_cost():
    result = World(CALM).run()
    assert good(result)
    assert result.machines == 4
    best = ideal(CALM, grace=300.0)
    assert result.cost < best.cost * 1.1
    assert max(result.waits) < 700


def test_lessons_2_a_long_outage_of_the_broker_ends_no_machine_and_doubles_no_work():
    result = changed(
        work=tuple(Work(arrives=0.0, lasts=3000.0) for _ in range(4)),
        accidents=(Accident(kind="blackout", at=300.0, share=1.0, seconds=1500.0),),
    )
    assert good(result)
    assert (result.machines, result.doubled) == (4, 0)


def test_the_same_seed_is_the_same_world():
    world = scenario(1003)
    assert World(world).run() == World(world).run()


def test_lessons_4_one_that_only_counts_ends_busy_machines():
    """What the figures are worth: the worlds do tell a bad planner from a good one."""
    results = [World(scenario(seed), naive).run() for seed in range(1000, 1006)]
    assert sum(one.busy_terminated for one in results) > 0


def test_lessons_3_a_conductor_that_dies_at_every_other_call_leaks_nothing():
    result = changed(conductor_deaths=0.3)
    assert good(result), result
    assert result.deaths > 10


def test_calls_whose_answers_are_all_lost_have_their_effect_once():
    result = changed(weather=Weather(boot=(60, 60), lost_answer_rate=1.0))
    assert good(result), result
    assert result.machines <= 5


def test_a_repeated_launch_that_is_refused_is_not_forgotten():
    """It was accepted the first time, and its machines come late: new ones in their place would be too many."""
    weather = Weather(boot=(60, 60), delivery=(40, 60), throttle_rate=0.3, listing_lag=20)
    work = tuple(Work(arrives=20.0 * number, lasts=900.0) for number in range(12))
    results = [changed(weather=replace(weather, seed=seed), work=work) for seed in range(8)]
    assert all(good(one) for one in results), results


def test_e07_machines_that_never_register_are_replaced_and_then_waited_with():
    """Three in a row hold the group for ten minutes, so it does not burn money on a broken image."""
    result = changed(weather=Weather(boot=(60, 60), never_registers_rate=1.0))
    assert good(result), result
    waves = result.machines / CALM.policy.max_machines
    assert 2 <= waves <= 5


def test_a_drought_ends_without_anybody_doing_anything():
    drought = Spell(start=at(0), end=at(1800))
    result = changed(weather=Weather(boot=(60, 60), droughts=(drought,)))
    assert good(result), result
    assert 1800 < max(result.waits) < 1800 + 900 + 700  # the longest hold, and a round of work


def test_an_outage_ends_no_machine():
    """LESSONS 2: what cannot be listed is not gone."""
    outage = Spell(start=at(120), end=at(1500))
    result = changed(weather=Weather(boot=(60, 60), outages=(outage,)))
    assert good(result), result
    assert result.doubled == 0


@pytest.mark.parametrize(("seconds", "twice"), [(5, 0), (30, 0), (120, 0), (400, 4)])
def test_a_partition_gives_work_away_after_the_grace_and_not_before(seconds: float, twice: int):
    accident = Accident(kind="partition", at=200.0, share=1.0, seconds=seconds)
    work = tuple(Work(arrives=0.0, lasts=1000.0) for _ in range(4))
    result = changed(accidents=(accident,), work=work)
    assert good(result), result
    assert result.doubled == twice


def test_a_storm_sends_the_work_to_other_machines():
    policy = replace(CALM.policy, spot=True)
    result = changed(policy=policy, accidents=(Accident(kind="storm", at=200.0, share=1.0),))
    assert good(result), result
    assert result.machines > 4


def test_kept_machines_are_there_when_the_work_is_done():
    assert good(changed(policy=replace(CALM.policy, min_machines=2)))
