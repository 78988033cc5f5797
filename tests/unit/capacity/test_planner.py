"""How the planner decides, case by case (E-05, E-07, L-14). What holds always is in test_planner_properties.py."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.unit.capacity.groups import NOW, ago, idle, machine, seat, view
from valohai_dagster.capacity.model import (
    ActionKind,
    Hold,
    Intent,
    MachineState,
    Policy,
    Purchase,
    View,
)
from valohai_dagster.capacity.planner import plan

POLICY = Policy(max_machines=5)


def told(seen: View, policy: Policy = POLICY) -> list[tuple[str, Any]]:
    """(kind, machine or count) of each action."""
    return [
        (one.kind.value, one.machine_id or one.count) for one in plan(seen, policy, NOW).actions
    ]


def test_e05_as_many_machines_as_wait_up_to_the_maximum():
    assert told(view(waiting=3)) == [("launch", 3)]
    assert told(view(waiting=30)) == [("launch", 5)]


def test_e05_machines_with_several_slots_are_launched_by_slots():
    assert told(view(waiting=5), Policy(slots=2)) == [("launch", 3)]


def test_e05_the_minimum_is_kept_when_nothing_waits():
    assert told(view(), Policy(min_machines=2)) == [("launch", 2)]
    kept = view(machine("a"), machine("b"), seats=idle("a", "b"))
    assert told(kept, Policy(min_machines=2)) == []


def test_l14_a_machine_is_not_launched_for_what_a_free_one_takes():
    assert told(view(machine(), waiting=1, seats=idle("m"))) == []


def test_l14_an_idle_machine_goes_after_its_grace_and_not_before():
    grace = POLICY.grace
    assert told(view(machine(), seats=idle("m", since=NOW - grace))) == [("drain", "m")]
    assert told(view(machine(), seats=idle("m", since=NOW - grace + timedelta(seconds=1)))) == []


def test_an_idle_machine_stays_while_work_that_it_can_take_waits():
    machines = machine("a"), machine("b")
    assert told(view(*machines, waiting=1, seats=idle("a", "b"))) == [("drain", "b")]


def test_a_machine_on_its_way_is_no_reason_to_let_a_warm_one_go():
    """What is still to come may never: two waiting, two warm, one booting."""
    warm, late = (machine("a"), machine("b")), machine("c", created_at=NOW)
    seen = view(*warm, late, waiting=2, seats=idle("a", "b"), registered=frozenset("ab"))
    assert told(seen) == []


def test_what_is_asked_for_counts_until_it_is_listed():
    asked = Intent(token="t", action=ActionKind.launch, at=NOW, count=2)
    assert told(view(waiting=3, intents=(asked,))) == [("launch", 1)]
    one_there = machine(token="t", created_at=NOW)
    seen = view(one_there, waiting=3, intents=(asked,), registered=frozenset())
    assert told(seen) == [("launch", 1)]


def test_a_worker_that_checks_in_before_its_machine_is_listed_counts_once():
    """Lists of clouds lag: a machine that is busy already is no machine for what waits."""
    asked = Intent(token="t", action=ActionKind.launch, at=NOW)
    seen = view(waiting=1, intents=(asked,), seats=(seat("early", busy=1),))
    assert told(seen) == [("launch", 1)]
    assert told(replace(seen, seats=idle("early"))) == []


def test_agents_of_one_machine_that_check_in_one_after_the_other_are_all_expected():
    seen = view(machine(created_at=NOW), waiting=4, seats=idle("m"))
    assert told(seen, Policy(slots=4)) == []
    late = view(machine(), waiting=4, seats=idle("m"))
    assert told(late, Policy(slots=4)) == [("launch", 1)]


def test_e07_a_machine_that_never_registers_is_replaced():
    """Ended at once; replaced when it does not count any more, or where there is room already."""
    seen = view(machine(created_at=ago(minutes=15)), waiting=1, registered=frozenset())
    assert told(seen) == [("terminate", "m"), ("launch", 1)]
    assert told(seen, Policy(max_machines=1)) == [("terminate", "m")]
    assert "E-07" in plan(seen, POLICY, NOW).actions[0].reason


def test_lessons_1_a_dead_worker_is_no_capacity():
    """Its machine counts against the maximum until it is known to be gone, but not as one that serves."""
    silent = view(machine(), waiting=1, last_seen={"m": ago(minutes=2)})
    assert told(silent) == [("launch", 1)]


def test_lessons_2_a_silent_machine_is_waited_for_longer_than_its_lease():
    silence = POLICY.silence
    assert told(view(machine(), last_seen={"m": NOW - silence})) == [("terminate", "m")]
    assert told(view(machine(), last_seen={"m": NOW - silence + timedelta(seconds=1)})) == []
    lost_lease = timedelta(seconds=330)
    assert lost_lease < silence


def test_lessons_2_nobody_is_silent_while_nobody_could_be_heard():
    since = NOW - POLICY.silence + timedelta(seconds=1)
    long_ago = {"m": ago(hours=1)}
    assert told(view(machine(), last_seen=long_ago, watched_since=since)) == []
    assert told(view(machine(), last_seen=long_ago)) == [("terminate", "m")]


def test_right_after_an_outage_machines_are_expected_back_and_not_replaced():
    just_now = ago(seconds=5)
    silent = view(machine(), last_seen={"m": ago(hours=1)}, watched_since=just_now)
    assert told(silent, Policy(min_machines=1)) == []
    never_heard = view(machine(), registered=frozenset(), watched_since=just_now)
    assert told(never_heard) == []
    assert told(replace(never_heard, watched_since=ago(minutes=2))) == [("terminate", "m")]


def test_e05_a_machine_that_is_being_started_counts_while_an_old_list_has_it_stopping():
    start = Intent(token="t", action=ActionKind.start, at=NOW, machine_id="m")
    stopping = machine(state=MachineState.stopping)
    assert told(view(stopping, waiting=2, intents=(start,)), Policy(max_machines=1)) == []


def test_lessons_2_a_silent_worker_with_work_keeps_its_machine():
    seats = (seat(busy=1, seen_at=ago(hours=1)),)
    assert told(view(machine(), seats=seats, last_seen={"m": ago(hours=1)})) == []


def test_a_worker_that_restarts_is_not_replaced_at_once():
    seen = view(machine(), last_seen={"m": ago(seconds=10)})
    assert told(seen, Policy(min_machines=1)) == []


def test_a_machine_that_is_taken_back_is_replaced_before_it_is_gone():
    seen = view(machine(reclaimed_at=NOW), waiting=1, seats=idle("m"))
    assert told(seen) == [("launch", 1)]


def test_drained_machines_are_terminated_or_kept_stopped():
    drained = view(
        machine("a"), machine("b"), seats=(seat("a", draining=True),), drained=frozenset("ab")
    )
    assert told(drained) == [("terminate", "a"), ("terminate", "b")]
    assert told(drained, Policy(stop_when_idle=True)) == [("stop", "a"), ("stop", "b")]
    assert told(drained, Policy(stop_when_idle=True, max_machines=1)) == [
        ("stop", "a"),
        ("terminate", "b"),
    ]


def test_a_drain_that_was_not_heard_is_told_again():
    """Whoever was to tell it may have died after writing it down."""
    assert told(view(machine(), seats=idle("m"), drained=frozenset("m"))) == [("drain", "m")]


def test_a_drained_machine_with_work_is_waited_for():
    seen = view(machine(), seats=(seat(busy=1, draining=True),), drained=frozenset("m"))
    assert told(seen) == []


def test_spot_machines_are_never_kept_stopped():
    spot = view(machine(purchase=Purchase.spot), drained=frozenset("m"))
    assert told(spot, Policy(stop_when_idle=True)) == [("terminate", "m")]


STOPPED = {"state": MachineState.stopped, "bootstrap": "1"}


def test_stopped_machines_are_started_before_new_ones_are_launched():
    seen = view(machine("a", **STOPPED), waiting=2)
    assert told(seen, Policy(bootstrap="1")) == [("start", "a"), ("launch", 1)]


def test_a_stopped_machine_with_an_old_start_is_of_no_use():
    seen = view(machine("a", **STOPPED), machine("b", **STOPPED), waiting=1)
    assert told(seen, Policy(bootstrap="2")) == [
        ("terminate", "a"),
        ("terminate", "b"),
        ("launch", 1),
    ]


def test_a_stopped_machine_is_destroyed_when_nobody_has_needed_it():
    since = {"m": NOW - POLICY.destroy_after}
    assert told(view(machine(**STOPPED), stopped_since=since)) == [("terminate", "m")]


def test_a_machine_that_is_started_again_is_given_time_to_check_in():
    """Its worker was last seen before it was stopped, which says nothing about now."""
    seen = view(
        machine(),
        waiting=1,
        last_seen={"m": ago(hours=1)},
        started={"m": ago(minutes=1)},
    )
    assert told(seen) == []
    late = replace(seen, started={"m": ago(minutes=20)})
    assert told(late) == [("terminate", "m"), ("launch", 1)]


def test_a_start_that_is_not_confirmed_counts_as_a_machine():
    asked = Intent(token="t", action=ActionKind.start, at=NOW, machine_id="m")
    assert told(view(machine(**STOPPED), waiting=1, intents=(asked,))) == []


def test_zones_are_filled_evenly_and_the_first_one_first():
    seen = view(machine("x", zone="a"), waiting=4, seats=(seat("x", busy=1),))
    actions = plan(seen, Policy(zones=("a", "b"), max_machines=9), NOW).actions
    assert {one.zone: one.count for one in actions} == {"a": 2, "b": 2}
    actions = plan(replace(seen, waiting={0: 1}), Policy(zones=("a", "b")), NOW).actions
    assert {one.zone: one.count for one in actions} == {"b": 1}


def test_a_held_zone_is_left_out_and_on_demand_comes_after_spot():
    policy = Policy(zones=("a", "b"), spot=True, on_demand_fallback=True)
    until = NOW + timedelta(minutes=1)
    held_a = Hold(zone="a", purchase=Purchase.spot, until=until, reason="no capacity in a")
    held_b = replace(held_a, zone="b", reason="no capacity in b")
    [action] = plan(view(waiting=1, holds=(held_a,)), policy, NOW).actions
    assert (action.zone, action.purchase) == ("b", Purchase.spot)
    [action] = plan(view(waiting=1, holds=(held_a, held_b)), policy, NOW).actions
    assert (action.zone, action.purchase) == ("a", Purchase.on_demand)
    assert "no spot capacity" in action.reason
    spot_only = replace(policy, on_demand_fallback=False)
    found = plan(view(waiting=1, holds=(held_a, held_b)), spot_only, NOW)
    assert found.actions == ()
    assert found.shortfall
    assert "no capacity in a; tried again at 12:01:00 UTC" in found.shortfall


@pytest.mark.parametrize(
    ("policy", "word"),
    [(Policy(max_machines=1), "all 1 machines"), (Policy(enabled=False), "disabled")],
)
def test_lessons_13_why_not_all_is_served(policy: Policy, word: str):
    found = plan(view(machine(), waiting=2, seats=(seat(busy=1),)), policy, NOW)
    assert found.shortfall
    assert word in found.shortfall


def test_the_first_to_go_never_registered_then_the_outdated_then_the_newest():
    machines = (
        machine("old", created_at=ago(hours=5)),
        machine("new", created_at=ago(hours=1)),
        machine("outdated", created_at=ago(hours=9)),
        machine("deaf", created_at=ago(hours=3)),
    )
    seats = (*idle("old", "new"), *idle("outdated", outdated=True))
    known = frozenset({"old", "new", "outdated"})
    seen = view(*machines, seats=seats, registered=known)
    assert told(seen) == [
        ("terminate", "deaf"),
        ("drain", "outdated"),
        ("drain", "new"),
        ("drain", "old"),
    ]
    assert told(seen, Policy(min_machines=1))[-1] == ("drain", "new")


def test_a_lower_maximum_is_reached_by_idle_machines_without_their_grace():
    machines = [machine(name, created_at=ago(hours=number)) for number, name in enumerate("abc")]
    seen = view(*machines, seats=idle("a", "b", "c", since=NOW))
    assert told(seen, Policy(max_machines=1)) == [("drain", "a"), ("drain", "b")]


def test_a_machine_that_is_kept_is_renewed_after_its_replacement_is_there():
    old = view(machine("old"), seats=idle("old", outdated=True))
    kept = Policy(min_machines=1)
    assert told(old, kept) == [("launch", 1)]
    booting = machine("new", created_at=NOW)
    assert told(replace(old, machines=(*old.machines, booting)), kept) == []
    both = view(machine("old"), booting, seats=(*old.seats, *idle("new", since=NOW)))
    assert told(both, kept) == [("drain", "old")]
    assert told(old, Policy(min_machines=1, max_machines=1)) == [("drain", "old")]


def test_an_old_agent_is_not_counted_on_for_what_waits():
    seen = view(machine(), waiting=1, seats=idle("m", outdated=True))
    assert told(seen) == [("drain", "m"), ("launch", 1)]


def test_a_disabled_group_lets_its_idle_machines_go():
    assert told(view(machine(), seats=idle("m", since=NOW)), Policy(enabled=False)) == [
        ("drain", "m")
    ]


def test_the_summary_counts_what_there_is():
    seats = (seat("a", busy=1), *idle("b"))
    seen = view(machine("a"), machine("b"), machine("c"), waiting=2, seats=seats)
    text = plan(seen, POLICY, NOW).summary
    assert text == "2 waiting; machines: 1 busy, 1 idle, 1 silent"


def test_ten_thousand_waiting_and_a_thousand_machines_are_planned_at_once():
    """Not timed here: that it ends is what is checked; `make bench-capacity` measures it."""
    names = [f"m{number}" for number in range(1000)]
    machines = [machine(name, zone="abc"[index % 3]) for index, name in enumerate(names)]
    seats = [seat(name, busy=1) for name in names]
    seen = view(*machines, seats=tuple(seats), waiting=10_000)
    policy = Policy(max_machines=2000, zones=("a", "b", "c"))
    started = time.perf_counter()
    assert sum(one.count for one in plan(seen, policy, NOW).actions) == 1000
    print(f"{(time.perf_counter() - started) * 1000:.1f} ms")
