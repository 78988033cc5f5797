"""What the planner is shown of what is known, and what has become of earlier calls, in data and words. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from valohai_dagster.capacity.book import Known
from valohai_dagster.capacity.look import Load, Look
from valohai_dagster.capacity.model import (
    Action,
    ActionKind,
    Hold,
    Intent,
    Machine,
    MachineState,
    Policy,
    Purchase,
    View,
)
from valohai_dagster.capacity.patience import Patience

NO_EFFECT = "no effect seen; decided anew"
_EFFECT = {  # states in which it has happened
    ActionKind.terminate: {MachineState.terminating, MachineState.gone},
    ActionKind.stop: {MachineState.stopping, MachineState.stopped},
    ActionKind.start: {MachineState.starting, MachineState.running},
}


def view_of(
    known: Sequence[Known],
    intents: Sequence[Intent],
    *,
    late: Container[str],
    load: Load,
    holds: tuple[Hold, ...],
    listed_at: datetime | None,
) -> View:
    """`late`: machines of which a call was refused just now; a stopped one among them is no help."""
    gone = [one.machine.token for one in known if one.machine.state is MachineState.gone]
    known = [one for one in known if one.machine.state is not MachineState.gone]
    return View(
        waiting=load.waiting,
        machines=tuple(_at_rest(one.machine, late) for one in known),
        seats=load.seats,
        watched_since=load.watched_since,
        registered=frozenset(one.machine.id for one in known if registered(one)),
        drained=frozenset(one.machine.id for one in known if one.draining_since),
        intents=tuple(
            replace(one, count=max(0, one.count - gone.count(one.token))) for one in intents
        ),
        holds=holds,
        last_seen={one.machine.id: one.worker_seen_at for one in known if one.worker_seen_at},
        stopped_since={one.machine.id: one.stopped_since for one in known if one.stopped_since},
        started={one.machine.id: one.started_at for one in known if one.started_at},
        listed_at=listed_at,
    )


def just_made(machine_id: str, intent: Intent, policy: Policy, now: datetime) -> Known:
    """A machine that a launch has told; no list has it yet."""
    machine = Machine(
        id=machine_id,
        zone=intent.zone,
        purchase=intent.purchase,
        state=MachineState.starting,
        created_at=now,
        token=intent.token,
        bootstrap=policy.bootstrap,
    )
    return Known(machine=machine, listed_at=now)


def effect_of(
    intent: Intent,
    known: Known | None,
    *,
    asked: bool,
    listed_at: datetime | None,
    now: datetime,
    patience: Patience,
) -> str | None:
    """What has become of a start, stop or terminate; None as long as that is open. `asked`: by this process."""
    if known is None:
        return "the machine is gone"
    if known.machine.state in _EFFECT[intent.action]:
        return known.machine.state.value
    if listed_at is None or listed_at <= intent.at:
        return None
    if not asked:
        return "not known whether the cloud was asked; decided anew"
    if known.missing_since or now - intent.at < patience.effect:
        return None
    return NO_EFFECT


def registered(known: Known) -> bool:
    """A worker has checked in since it runs, that is, since it was last started."""
    if known.started_at is None:
        return known.registered_at is not None
    return known.worker_seen_at is not None and known.worker_seen_at >= known.started_at


def due_times(
    machines: Iterable[Known],
    look: Look,
    patience: Patience,
) -> Iterator[datetime]:
    """When something may have to happen although nobody does anything."""
    policy, seats, watched_since = look.policy, look.seats, look.load.watched_since
    for known in machines:
        machine = known.machine
        if machine.state is MachineState.gone:
            yield known.listed_at + patience.list_every
        elif known.missing_since:
            yield known.missing_since + patience.confirm
            yield machine.created_at + patience.fresh
        elif known.stopped_since:
            yield known.stopped_since + policy.destroy_after
        elif not registered(known):
            yield (known.started_at or machine.created_at) + policy.boot
        elif machine.id not in seats and known.worker_seen_at:
            yield max(known.worker_seen_at, watched_since or known.worker_seen_at) + policy.silence
        if known.orphan_since:
            yield known.orphan_since + patience.orphan
    for those in seats.values():
        yield from (seat.idle_since + policy.grace for seat in those if seat.idle_since)


def odd_ones(look: Look, stuck: Mapping[str, str], patience: Patience) -> Iterator[str]:
    """What is wrong with machines that nobody waits for. `stuck`: those that cannot be stopped or ended, with what happened."""
    for machine_id, known in look.inventory.known.items():
        missing = known.missing_since
        if machine_id in stuck:
            yield f"machine {machine_id}: {stuck[machine_id]}"
        elif missing and look.now - missing >= patience.confirm and look.may_live(known, patience):
            yield (
                f"the cloud has not listed machine {machine_id} since {missing:%H:%M:%S} UTC, yet its"
                " worker checks in: was the place of the group changed in the settings?"
            )


def decision_text(action: Action) -> str:
    """One line of a group's history."""
    if action.kind is ActionKind.launch:
        place = place_text(action.zone, action.purchase)
        return f"launch {action.count} ({place}): {action.reason}"
    return f"{action.kind.value} {action.worker or action.machine_id}: {action.reason}"


def place_text(zone: str, purchase: Purchase) -> str:
    return f"{zone}, {purchase.value}" if zone else purchase.value


def _at_rest(machine: Machine, late: Container[str]) -> Machine:
    if machine.id in late and machine.state is MachineState.stopped:
        return replace(machine, state=MachineState.stopping)
    return machine
