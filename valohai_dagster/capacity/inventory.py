"""What is known of a group's machines, brought up to date with what the cloud lists and which workers check in. Pure.

A machine is forgotten only when the cloud has confirmed that it is gone, in two steps: first it is written down as gone
and its death is told, and at the next look its row is closed. So a death that was not told because the process ended is
told by the next one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from valohai_dagster.capacity.book import Kind, Known
from valohai_dagster.capacity.model import Machine, MachineState, Seat
from valohai_dagster.capacity.patience import Patience

_RUNS = frozenset({MachineState.starting, MachineState.running})
_RESTS = frozenset({MachineState.stopping, MachineState.stopped})
WITHDRAWN = "the cloud accepted its launch and ended it before it ran"


class Inventory:
    """Used for one look. `changed` is what has to be saved, `notes` what to write into the history."""

    def __init__(
        self,
        known: Iterable[Known],
        patience: Patience,
        now: datetime,
        *,
        ending: Mapping[str, str],
    ) -> None:
        """`ending`: machines that the cloud was asked to end, with the reason."""
        self.known = {one.machine.id: one for one in known}
        self._saved = dict(self.known)
        self._patience, self._now, self._ending = patience, now, ending
        self.notes: list[tuple[Kind, str, str]] = []
        self.dead: dict[str, str] = {}
        self.failed: list[str] = []  # ended without ever having checked in
        self.withdrawn: list[Machine] = []  # ended by the cloud before they ran
        self.registered: list[str] = []  # checked in for the first time
        self.closed: list[Known] = []

    def put(self, known: Known) -> None:
        self.known[known.machine.id] = known

    def changed(self) -> Sequence[Known]:
        """Those that differ from what is saved; mere times of being seen count when they are some way off."""
        found = [one for one in self.known.values() if self._differs(one)]
        return [*self.closed, *found]

    def saved(self) -> None:
        """All changes so far are written."""
        self._saved = dict(self.known)
        self.closed, self.notes = [], []

    def _differs(self, new: Known) -> bool:
        old = self._saved.get(new.machine.id)
        if old is None:
            return True
        if replace(new, listed_at=old.listed_at, worker_seen_at=old.worker_seen_at) != old:
            return True
        if (new.worker_seen_at is None) != (old.worker_seen_at is None):
            return True
        lag = new.listed_at - old.listed_at
        if new.worker_seen_at and old.worker_seen_at:
            lag = max(lag, new.worker_seen_at - old.worker_seen_at)
        return lag >= self._patience.seen_every

    # -- ends --------------------------------------------------------------------------------------------------

    def close(self, told: set[str]) -> None:
        """Closes the rows of machines that were found gone at an earlier look; `told`: whose deaths were told since.

        Those of others are told again.
        """
        for one in list(self.known.values()):
            if one.machine.state is not MachineState.gone:
                continue
            if one.machine.id not in told:
                self.dead[one.machine.id] = one.reason or "the cloud has confirmed that it is gone"
                continue
            del self.known[one.machine.id]
            self.closed.append(replace(one, gone_at=one.missing_since or self._now))

    def _gone(self, known: Known, how: str) -> None:
        machine = known.machine
        known = self._given_up(known, MachineState.gone)
        known = replace(known, reason=known.reason or self._ending.get(machine.id))
        asked = known.reason is not None
        since = known.missing_since or self._now
        if machine.reclaimed_at is not None and not asked:
            how = f"the cloud took it back ({how})"
        text = f"gone: {known.reason}" if known.reason else f"lost: {how}"
        self.put(
            replace(
                _stop_ended(known, since),
                machine=replace(machine, state=MachineState.gone),
                missing_since=since,
                reason=known.reason or how,
            )
        )
        self.notes.append((Kind.gone if asked else Kind.lost, text, machine.id))
        self.dead[machine.id] = known.reason or how
        if not asked and not known.registered_at and not known.adopted:
            self.failed.append(machine.id)

    def _given_up(self, known: Known, state: MachineState) -> Known:
        """A launch that the cloud takes back after all shows in the end of a machine that never ran."""
        machine = known.machine
        ends = state in (MachineState.terminating, MachineState.gone)
        ours = known.reason or machine.id in self._ending or machine.reclaimed_at
        if not ends or ours or machine.state is not MachineState.starting or known.registered_at:
            return known
        self.withdrawn.append(machine)
        return replace(known, reason=WITHDRAWN)

    # -- lists -------------------------------------------------------------------------------------------------

    def take_list(
        self,
        listed: Iterable[Machine],
        *,
        ours: Callable[[Machine], tuple[str, datetime] | None],
        may_live: Callable[[Known], bool],
        closed: Container[str],
        misses: dict[str, int],
    ) -> None:
        """`ours`: token of the launch that made a machine and when that was, None for nobody's. `may_live`: of
        one that no list has. `closed`: ids that are done with.

        `misses`: lists in a row that have not had a machine, kept by the caller from look to look.
        """
        there = {machine.id: machine for machine in listed}
        for machine_id, known in list(self.known.items()):
            machine = there.pop(machine_id, None)
            if known.machine.state is MachineState.gone:
                continue
            if machine is not None:
                misses.pop(machine_id, None)
                self._present(known, machine)
            else:
                misses[machine_id] = misses.get(machine_id, 0) + 1
                self._missing(known, misses[machine_id], may_live)
        for machine in there.values():
            if machine.id not in closed:
                self._found(machine, ours(machine))

    def _present(self, known: Known, machine: Machine) -> None:
        born = known.machine.created_at  # the cloud's clock may be another
        machine = replace(machine, token=machine.token or known.machine.token, created_at=born)
        if self._is_late(known, machine):
            machine = replace(machine, state=known.machine.state)
        known = self._given_up(known, machine.state)
        known = replace(known, machine=machine, listed_at=self._now, missing_since=None)
        if machine.state is MachineState.gone:
            self._gone(known, "the cloud has ended it")
            return
        if machine.state is MachineState.stopped and known.stopped_since is None:
            known = replace(known, stopped_since=self._now)
        elif machine.state in _RUNS:
            if (
                known.stopped_since
                and (known.started_at or known.stopped_since) <= known.stopped_since
            ):
                known = replace(known, started_at=self._now)  # by somebody else
            known = _stop_ended(known, self._now)
        self.put(known)

    def _is_late(self, known: Known, machine: Machine) -> bool:
        """Whether the list is older than the one that showed it to be started, or stopped."""
        was, says = known.machine.state, machine.state
        started, stopped = known.started_at, known.stopped_since
        changed = None
        if was in _RUNS and says in _RESTS:
            changed = started
        elif was in _RESTS and says in _RUNS and not (started and stopped and started > stopped):
            changed = stopped
        return changed is not None and self._now - changed < self._patience.confirm

    def _missing(self, known: Known, times: int, may_live: Callable[[Known], bool]) -> None:
        """A machine that speaks is not gone, though it may be where the driver does not look any more."""
        patience, now = self._patience, self._now
        known = replace(known, missing_since=known.missing_since or now)
        assert known.missing_since is not None
        fresh = known.reason is None and now - known.machine.created_at < patience.fresh
        enough = times >= patience.confirm_lists and now - known.missing_since >= patience.confirm
        if enough and not fresh and not may_live(known):
            self._gone(known, "the cloud does not list it any more")
        else:
            self.put(known)

    def _found(self, machine: Machine, launch: tuple[str, datetime] | None) -> None:
        if launch is not None:
            token, asked_at = launch
            born = min(max(machine.created_at, asked_at), self._now)
            machine = replace(machine, token=token, created_at=born)
            young = replace(machine, state=MachineState.starting)
            known = Known(machine=young, listed_at=self._now)
            known = replace(self._given_up(known, machine.state), machine=machine)
            self.put(known)
            if machine.state is MachineState.gone:
                self._gone(known, "the cloud has ended it")
        elif machine.state is not MachineState.gone:
            why = "has the tags of this group, but nobody here is known to have launched it"
            self.put(
                Known(machine=machine, adopted=True, listed_at=self._now, orphan_since=self._now)
            )
            self.notes.append((Kind.orphan, why, machine.id))

    # -- workers -----------------------------------------------------------------------------------------------

    def take_seats(self, seats: Mapping[str, Sequence[Seat]]) -> None:
        """Workers by machine. A machine of which one checks in is nobody's no longer."""
        for machine_id, those in seats.items():
            known = self.known.get(machine_id)
            if known is None or not those:
                continue
            seen = max(seat.seen_at for seat in those)
            if known.registered_at is None:
                took = max(timedelta(0), self._now - known.machine.created_at)
                text = f"checked in after {took.total_seconds():.0f} s"
                self.notes.append((Kind.registered, text, machine_id))
                self.registered.append(machine_id)
                known = replace(known, registered_at=self._now)
            if known.orphan_since is not None:
                text = "has workers of this group, so it is kept as one of its machines"
                self.notes.append((Kind.adopted, text, machine_id))
                known = replace(known, orphan_since=None)
            last = known.worker_seen_at
            self.put(replace(known, worker_seen_at=max(seen, last) if last else seen))


def by_machine(seats: Iterable[Seat]) -> dict[str, list[Seat]]:
    found: dict[str, list[Seat]] = defaultdict(list)
    for seat in seats:
        found[seat.machine_id].append(seat)
    return found


def _stop_ended(known: Known, at: datetime) -> Known:
    if known.stopped_since is None:
        return known
    more = max(0.0, (at - known.stopped_since).total_seconds())
    return replace(known, stopped_since=None, stopped_seconds=known.stopped_seconds + more)
