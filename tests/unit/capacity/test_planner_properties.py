"""What holds of the planner whatever it sees (E-05, E-07, L-14)."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings

from tests.unit.capacity.groups import ALIVE, NOW, carried_out, policies, views
from valohai_dagster.capacity.fleet import Fleet
from valohai_dagster.capacity.model import ActionKind, MachineState, Policy, View
from valohai_dagster.capacity.planner import plan

ENDS = (ActionKind.stop, ActionKind.terminate)
MANY = settings(max_examples=400)


def busy(view: View) -> set[str]:
    return {one.machine_id for one in view.seats if one.busy}


def launched(view: View, policy: Policy) -> int:
    kinds = (ActionKind.launch, ActionKind.start)
    return sum(one.count for one in plan(view, policy, NOW).actions if one.kind in kinds)


@MANY
@given(views(), policies)
def test_e05_a_busy_machine_is_never_drained_stopped_or_terminated(view: View, policy: Policy):
    ended = {
        action.machine_id
        for action in plan(view, policy, NOW).actions
        if action.kind in (*ENDS, ActionKind.drain)
    }
    assert not ended & busy(view)


@MANY
@given(views(), policies)
def test_e05_never_more_machines_than_the_maximum_with_those_asked_for(view: View, policy: Policy):
    number = launched(view, policy)
    assert number == 0 or Fleet(view, policy, NOW).existing + number <= policy.max_machines


@MANY
@given(views(), policies)
def test_e05_idle_machines_go_only_down_to_the_minimum(view: View, policy: Policy):
    """An old agent where there is no room for its replacement is the one exception, one at a time."""
    fleet = Fleet(view, policy, NOW)
    ready = {one.id for one in fleet.members if one.ready}
    drained = {
        action.machine_id
        for action in plan(view, policy, NOW).actions
        if action.kind is ActionKind.drain and action.machine_id in ready
    }
    outdated = {one.id for one in fleet.members if one.outdated}
    left = len(ready) - len(drained)
    full = len(ready) == fleet.existing >= policy.max_machines
    allowed = 1 if full and drained <= outdated else 0
    assert not drained or left >= fleet.floor - allowed


@MANY
@given(views(), policies)
def test_the_minimum_is_asked_for_as_far_as_there_is_room(view: View, policy: Policy):
    view = replace(view, holds=())
    fleet = Fleet(view, policy, NOW)
    lacking = fleet.floor - fleet.serving
    room = policy.max_machines - fleet.existing
    assert launched(view, policy) >= min(lacking, room)


@MANY
@given(views(), policies)
def test_only_what_has_drained_never_registered_or_been_silent_is_terminated(
    view: View, policy: Policy
):
    """LESSONS 4: the drain comes before the end."""
    seats: dict[str, list[bool]] = {}
    for one in view.seats:
        fresh = NOW - one.seen_at < policy.silence
        seats.setdefault(one.machine_id, []).append(fresh and not one.draining)
    for action in plan(view, policy, NOW).actions:
        if action.kind in ENDS:
            assert action.machine_id
            assert not any(seats.get(action.machine_id, []))


@MANY
@given(views(), policies)
def test_a_cloud_that_cannot_be_listed_loses_no_machine(view: View, policy: Policy):
    """LESSONS 2: not to reach it is not its end."""
    actions = plan(replace(view, listed_at=None), policy, NOW).actions
    assert {action.kind for action in actions} <= {ActionKind.launch, ActionKind.start}


@MANY
@given(views(), policies)
def test_nothing_is_done_twice_while_the_first_time_is_under_way(view: View, policy: Policy):
    under_way = {one.machine_id for one in view.intents if one.machine_id}
    touched = {
        action.machine_id
        for action in plan(view, policy, NOW).actions
        if action.kind is not ActionKind.launch
    }
    assert not touched & under_way


@MANY
@given(views(), policies)
def test_when_all_of_it_is_done_nothing_is_left_to_do(view: View, policy: Policy):
    """Drained, then ended, then replaced: at the same moment it comes to rest, and does not swing."""
    if not view.listed_at:
        view = replace(view, listed_at=NOW)
    for _ in range(12):
        found = plan(view, policy, NOW)
        if not found.actions:
            return
        view = carried_out(view, found, policy)
    raise AssertionError(plan(view, policy, NOW))


@MANY
@given(views(), policies)
def test_what_is_launched_is_not_more_than_what_waits_or_is_kept(view: View, policy: Policy):
    fleet = Fleet(view, policy, NOW)
    lacking = -(-(fleet.waiting - fleet.capacity()) // fleet.slots)
    kept = fleet.floor - fleet.serving
    assert launched(view, policy) <= max(0, lacking, kept) + 1  # one in place of an old agent
    if not any(one.outdated for one in fleet.members):
        assert launched(view, policy) <= max(0, lacking, kept)


@MANY
@given(views(), policies)
def test_what_waits_with_room_and_no_hold_gets_a_machine_or_a_reason(view: View, policy: Policy):
    fleet = Fleet(view, policy, NOW)
    lacks = fleet.waiting > fleet.capacity()
    found = plan(view, policy, NOW)
    room = fleet.existing < policy.max_machines and policy.enabled
    free = not any(hold.until > NOW for hold in view.holds)
    if lacks and room and free:
        assert launched(view, policy) > 0
    if lacks and not launched(view, policy):
        assert found.shortfall


@MANY
@given(views(), policies)
def test_nothing_is_launched_where_a_hold_stands(view: View, policy: Policy):
    held = [one for one in view.holds if one.until > NOW]
    zones = {one.id: (one.zone, one.purchase) for one in view.machines}
    for action in plan(view, policy, NOW).actions:
        if action.kind is ActionKind.launch:
            zone, purchase = action.zone, action.purchase
        elif action.kind is ActionKind.start:
            zone, purchase = zones[action.machine_id or ""]
        else:
            continue
        assert not any(
            one.zone in (None, zone) and one.purchase in (None, purchase) for one in held
        )


@MANY
@given(views(), policies)
def test_a_disabled_group_grows_by_nothing(view: View, policy: Policy):
    assert launched(view, replace(policy, enabled=False)) == 0


@MANY
@given(views(), policies)
def test_each_machine_is_told_one_thing_and_each_action_says_why(view: View, policy: Policy):
    actions = plan(view, policy, NOW).actions
    ended = [one.machine_id for one in actions if one.kind in (*ENDS, ActionKind.start)]
    drained = [one.worker for one in actions if one.kind is ActionKind.drain]
    assert len(set(ended)) == len(ended)
    assert len(set(drained)) == len(drained)
    assert not set(ended) & {one.machine_id for one in actions if one.kind is ActionKind.drain}
    assert all(one.reason for one in actions)


@MANY
@given(views(), policies)
def test_machines_that_are_over_are_left_alone(view: View, policy: Policy):
    over = {one.id for one in view.machines if one.state not in (*ALIVE, MachineState.stopped)}
    assert not over & {action.machine_id for action in plan(view, policy, NOW).actions}


@MANY
@given(views(), policies)
def test_the_same_view_gives_the_same_plan(view: View, policy: Policy):
    assert plan(view, policy, NOW) == plan(view, policy, NOW)
