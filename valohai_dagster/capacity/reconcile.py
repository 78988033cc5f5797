"""Brings the machines of one group to what its plan says: look, remember, plan, act.

Every call that changes something in the cloud is written down first, with a token that names it, and settled when its
effect is seen. A process that ends in between leaves the intent; the next one repeats launches with the same token, which
makes no second machine, and decides anew about everything else. What the cloud refuses becomes a hold, and the plan is
made again at once, so that another zone or way of buying is tried in the same look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from valohai_dagster.capacity import holds as holding
from valohai_dagster.capacity import seeing
from valohai_dagster.capacity.book import Book, Kind, Overtaken
from valohai_dagster.capacity.clouds.base import CloudError, Driver, Launch, Trouble
from valohai_dagster.capacity.inventory import Inventory
from valohai_dagster.capacity.look import Load, Look, Outcome
from valohai_dagster.capacity.model import (
    Action,
    ActionKind,
    Hold,
    Intent,
    Machine,
    MachineState,
    Plan,
    Policy,
    View,
)
from valohai_dagster.capacity.patience import PATIENCE, Patience
from valohai_dagster.capacity.planner import plan
from valohai_dagster.capacity.strangers import Strangers
from valohai_dagster.errors import ValohaiError

_ROUNDS = 12  # plans in one look, each after a refusal
_SKEW = timedelta(minutes=1)  # between the cloud's clock and ours
_KEPT = timedelta(days=1)
_ORDER = list(ActionKind)  # what brings machines goes first


class Reconciler:
    """One group. `step` blocks on the cloud's API; whoever calls it sees to it that nobody else does so for this group."""

    def __init__(
        self,
        group: str,
        driver: Driver,
        book: Book,
        *,
        prepare: Callable[[Launch], Launch],
        clock: Callable[[], datetime],
        make_token: Callable[[], str],
        patience: Patience = PATIENCE,
        seal: Callable[[str], bool] = lambda machine_id: True,
    ) -> None:
        """`prepare` completes a launch with user data and tags. `seal`: from now on workers of the machine get no work;
        False if one that may have some is there."""
        self.group = group
        self._driver, self._book = driver, book
        self._prepare, self._clock, self._make_token = prepare, clock, make_token
        self._patience, self._seal = patience, seal
        self._listed_at: datetime | None = None
        self._listed: frozenset[str] = frozenset()  # ids in the last list
        self._misses: dict[str, int] = {}  # lists in a row without a machine
        self._closed: dict[str, datetime] = {}  # machines that are done with
        self._told: set[str] = set()  # deaths that an earlier outcome had
        self._asked: dict[str, tuple[datetime, datetime]] = {}  # first and last time, by token
        self._launches: dict[str, Launch] = {}  # complete ones, by token
        self._tokens: dict[str, datetime] = {}  # of launches by this process, when asked for
        self._not_before: dict[str, datetime] = {}  # of a machine that a call did nothing for
        # Such calls in a row, and of the last one what was wanted and the words.
        self._vain: dict[str, tuple[int, ActionKind, str]] = {}
        self._reminded: dict[str, datetime] = {}  # workers told to drain
        self._strangers = Strangers()

    def step(self, load: Load, policy: Policy) -> Outcome:
        """Raises what the book raises; calls to the cloud that fail become holds and words."""
        now = self._clock()
        can_stop = self._driver.can_stop and policy.stop_when_idle
        policy = replace(policy, stop_when_idle=can_stop)
        known = self._book.machines()
        ending = {
            one.machine_id: one.reason
            for one in self._book.intents()
            if one.machine_id and one.action is ActionKind.terminate
        }
        look = Look(load, policy, now, Inventory(known, self._patience, now, ending=ending))
        try:
            decided = self._look(look)
        except Overtaken as error:
            decided = Plan(summary=str(error))
        self._told = set(look.inventory.dead)
        return self._outcome(look, decided)

    def _look(self, look: Look) -> Plan:
        look.inventory.close(self._told)
        if self._listed_at is None:
            self._closed.update(self._book.gone_since(look.now - _KEPT))
        self._closed.update((one.machine.id, look.now) for one in look.inventory.closed)
        self._take_list(look)
        look.inventory.take_seats(look.seats)
        self._remember(look.inventory)
        self._count_check_ins(look.inventory)
        self._settle(look)
        self._ask_again(look)
        self._end_orphans(look)
        self._send_strangers_home(look)
        decided = self._plan(look)
        for _ in range(_ROUNDS):
            look.refused = False
            self._act(look, decided.actions)
            if not look.refused:
                break
            decided = self._plan(look)
        self._hold_withdrawn(look)
        seen = {seat.worker for seat in look.load.seats}
        self._reminded = {one: at for one, at in self._reminded.items() if one in seen}
        return decided

    def not_told(self) -> None:
        """What the last outcome had to tell did not arrive: the next one has it again."""
        self._told.clear()
        self._reminded.clear()

    def retry_now(self) -> None:
        """Forgets all holds: the settings were changed, or somebody says that the cause is gone."""
        for hold in self._book.holds():
            self._book.release(hold.zone, hold.purchase)

    # -- looking -----------------------------------------------------------------------------------------------

    def _take_list(self, look: Look) -> None:
        now, holds = look.now, self._book.holds()
        hold = holding.find(holds, holding.LISTING, None)
        if hold is not None and hold.until > now:
            self._listed_at = None
            return
        if self._listed_at is not None and now - self._listed_at < self._patience.list_every:
            return
        try:
            listed = self._driver.list()
        except CloudError as error:
            self._listed_at = None
            self._hold(holding.hold_of_lists(error, holds, now), holds)
            return
        if hold is not None:
            self._release(hold, "the cloud answers again")
        self._listed_at, self._listed = now, frozenset(machine.id for machine in listed)
        self._closed = {one: at for one, at in self._closed.items() if now - at < _KEPT}
        self._tokens = {one: at for one, at in self._tokens.items() if now - at < _KEPT}
        launches = self._launch_intents()
        look.inventory.take_list(
            listed,
            ours=lambda machine: self._launched_by(machine, launches),
            may_live=lambda known: look.may_live(known, self._patience),
            closed=self._closed,
            misses=self._misses,
        )

    def _launched_by(
        self, machine: Machine, launches: Sequence[Intent]
    ) -> tuple[str, datetime] | None:
        """Token of the launch that made it, and since when it was asked for. Where the cloud keeps none, one that is open
        and not younger."""
        if machine.token is None:
            fits = ((one.token, one.at) for one in launches if machine.created_at >= one.at - _SKEW)
            return next(fits, None)
        asked = next((one.at for one in launches if one.token == machine.token), None)
        asked = asked or self._tokens.get(machine.token)
        return None if asked is None else (machine.token, asked)

    def _launch_intents(self) -> list[Intent]:
        return [one for one in self._book.intents() if one.action is ActionKind.launch]

    def _remember(self, inventory: Inventory) -> None:
        changed = inventory.changed()
        if changed:
            self._book.save(*changed)
        for kind, text, machine_id in inventory.notes:
            self._book.note(kind, text, machine_id=machine_id)
        for one in inventory.closed:
            self._misses.pop(one.machine.id, None)
            self._not_before.pop(one.machine.id, None)
            self._vain.pop(one.machine.id, None)
        inventory.saved()

    def _count_check_ins(self, inventory: Inventory) -> None:
        for machine_id in inventory.failed:
            self._never_checked_in(machine_id, inventory)
        if inventory.registered:
            hold = holding.find(self._book.holds(), holding.CHECK_IN, None)
            if hold is not None:
                self._release(hold, "machines check in again")
        # Only now: what a list has may still be withdrawn.
        came = [inventory.known[machine_id].machine for machine_id in inventory.registered]
        for hold in self._book.holds():
            if hold.until <= self._clock() and any(
                holding.covers(hold, machine.zone, machine.purchase) for machine in came
            ):
                self._release(hold, "machines come again")

    def _never_checked_in(self, machine_id: str, inventory: Inventory) -> None:
        holds = self._book.holds()
        self._hold(holding.hold_of_check_ins(holds, machine_id, self._clock()), holds)

    # -- what earlier calls have come to -----------------------------------------------------------------------

    def _settle(self, look: Look) -> None:
        for intent in self._book.intents():
            if intent.action is ActionKind.launch:
                outcome = self._launched(look, intent)
            else:
                outcome = seeing.effect_of(
                    intent,
                    look.inventory.known.get(intent.machine_id or ""),
                    asked=intent.token in self._asked,
                    listed_at=self._listed_at,
                    now=look.now,
                    patience=self._patience,
                )
            if outcome is None:
                continue
            self._done(intent, outcome)
            if intent.machine_id and outcome == seeing.NO_EFFECT:
                since = f"{intent.at:%H:%M:%S} UTC"
                text = f"was accepted at {since} and did nothing"
                self._in_vain(look, intent, text)
            elif intent.machine_id:
                self._vain.pop(intent.machine_id, None)

    def _done(self, intent: Intent, outcome: str) -> None:
        self._book.settle(intent.token, outcome)
        self._asked.pop(intent.token, None)
        self._launches.pop(intent.token, None)

    def _came(self, look: Look, token: str) -> int:
        """Machines of a launch that the last list had."""
        there = (one for one in look.inventory.known.values() if one.machine.token == token)
        return sum(one.machine.id in self._listed for one in there)

    def _launched(self, look: Look, intent: Intent) -> str | None:
        if self._listed_at is None:
            return None
        came = self._came(look, intent.token)
        if came >= intent.count:
            return f"{came} machines"
        since, _ = self._asked.get(intent.token, (intent.at, intent.at))
        if look.now - since < self._patience.settle:
            return None
        text = f"{came} of {intent.count} machines asked for at {since:%H:%M:%S} UTC came"
        if intent.token in self._asked:
            error = CloudError(
                f"{text} ({seeing.place_text(intent.zone, intent.purchase)})",
                code="none-came",
                trouble=Trouble.capacity,
                zone=intent.zone or None,
                purchase=intent.purchase,
            )
            holds = self._book.holds()
            self._hold(holding.hold_after(error, holds, look.now), holds)
        return text

    def _ask_again(self, look: Look) -> None:
        """Launches of which the answer is not known, and those that were accepted and have not come yet: the cloud may
        have found out meanwhile that it cannot."""
        for intent in self._launch_intents():
            if self._came(look, intent.token) >= intent.count or self._held(intent, look.now):
                continue
            _, last = self._asked.get(intent.token, (None, None))
            if last is None and (not look.wanted or look.now - intent.at >= self._patience.settle):
                continue  # if it was made after all, the list will tell
            if last is None or look.now - last >= self._patience.ask_again:
                self._launch(look, intent)

    def _held(self, place: Intent | Machine, now: datetime) -> bool:
        holds = holding.in_force(self._book.holds(), now)
        return any(holding.covers(hold, place.zone, place.purchase) for hold in holds)

    def _hold_withdrawn(self, look: Look) -> None:
        """After acting: a new launch was told why, if anybody knows, and has made the hold."""
        for machine in look.inventory.withdrawn:
            if not self._held(machine, look.now):
                holds = self._book.holds()
                self._hold(holding.hold_of_withdrawn(holds, machine, look.now), holds)

    def _end_orphans(self, look: Look) -> None:
        """The second phase: still nobody's after a while."""
        if self._listed_at is None:
            return
        pending = {intent.machine_id for intent in self._book.intents()}
        for known in list(look.inventory.known.values()):
            machine = known.machine
            if (
                look.orphaned(known)
                and known.orphan_since is not None
                and look.now - known.orphan_since >= self._patience.orphan
                and machine.id not in pending
                and machine.state not in (MachineState.terminating, MachineState.gone)
            ):
                why = "nobody here launched it, and no worker of it checked in"
                action = Action(kind=ActionKind.terminate, machine_id=machine.id, reason=why)
                self._act(look, (action,))

    # -- planning ----------------------------------------------------------------------------------------------

    def _plan(self, look: Look) -> Plan:
        return plan(self._view(look), look.policy, look.now)

    def _view(self, look: Look) -> View:
        late = {one for one, until in self._not_before.items() if until > look.now}
        return seeing.view_of(
            [one for one in look.inventory.known.values() if not look.orphaned(one)],
            self._book.intents(),
            late=late,
            load=replace(look.load, seats=self._strangers.without(look.load.seats)),
            holds=holding.in_force(self._book.holds(), look.now),
            listed_at=self._listed_at,
        )

    # -- acting ------------------------------------------------------------------------------------------------

    def _act(self, look: Look, actions: Iterable[Action]) -> None:
        for action in sorted(actions, key=lambda one: _ORDER.index(one.kind)):
            if action.kind is ActionKind.drain:
                self._drain(look, action)
                continue
            if action.machine_id and not self._may_change(look, action.machine_id):
                continue
            intent = Intent(
                token=self._make_token(),
                action=action.kind,
                at=look.now,
                zone=action.zone,
                purchase=action.purchase,
                count=action.count,
                machine_id=action.machine_id,
                reason=action.reason,
            )
            self._book.intend(intent)
            self._decided(look, action)
            if action.kind is ActionKind.launch:
                self._launch(look, intent)
            else:
                self._change(look, intent)

    def _may_change(self, look: Look, machine_id: str) -> bool:
        """Not right after a refusal; and many changes are spread over several looks, so that launches need not wait."""
        if self._clock() - look.now >= self._patience.act:
            return False
        return self._not_before.get(machine_id, look.now) <= look.now

    def _decided(self, look: Look, action: Action) -> None:
        text = seeing.decision_text(action)
        look.decisions.append(text)
        self._book.note(Kind.decision, text, machine_id=action.machine_id)

    def _drain(self, look: Look, action: Action) -> None:
        """The plan says it again until the worker has heard; the history once."""
        known = look.inventory.known.get(action.machine_id or "")
        if action.worker is None or known is None:
            return
        told = self._reminded.get(action.worker)
        if told is not None and look.now - told < self._patience.remind:
            return
        if known.draining_since is None:
            known = replace(known, draining_since=look.now, reason=action.reason)
            look.inventory.put(known)
            self._remember(look.inventory)
            look.draining.add(known.machine.id)
        if known.machine.id in look.draining:
            self._decided(look, action)
        look.drain[action.worker] = known.reason or action.reason
        self._reminded[action.worker] = look.now

    def _send_strangers_home(self, look: Look) -> None:
        for machine_id, text in self._strangers.look(look.load.seats, self._closed):
            self._book.note(Kind.trouble, text, machine_id=machine_id)
        for worker, reason in self._strangers.to_drain():
            told = self._reminded.get(worker)
            if told is None or look.now - told >= self._patience.remind:
                look.drain[worker] = reason
                self._reminded[worker] = look.now

    def _launch(self, look: Look, intent: Intent) -> None:
        launch = self._launches.get(intent.token) or Launch(
            token=intent.token, count=intent.count, zone=intent.zone, purchase=intent.purchase
        )
        self._tokens.setdefault(intent.token, intent.at)
        try:
            if intent.token not in self._launches:
                launch = self._launches[intent.token] = self._prepare(launch)
            ids = self._driver.launch(launch)
        except ValohaiError as error:
            self._refused(look, intent, error)
            return
        first, _ = self._asked.get(intent.token, (look.now, look.now))
        self._asked[intent.token] = (first, look.now)
        self._made(look, intent, ids)

    def _made(self, look: Look, intent: Intent, ids: Iterable[str]) -> None:
        for machine_id in ids:
            if machine_id not in look.inventory.known and machine_id not in self._closed:
                look.inventory.put(seeing.just_made(machine_id, intent, look.policy, look.now))
        self._remember(look.inventory)

    def _refused(self, look: Look, intent: Intent, error: ValohaiError) -> None:
        """One that got no answer may have had its effect: its intent stays, and is asked for again after the hold."""
        if not isinstance(error, CloudError):
            error = CloudError(str(error), code="not-prepared", trouble=Trouble.invalid)
        look.refused = True
        self._made(look, intent, error.made)
        holds = self._book.holds()
        self._hold(holding.hold_after(error, holds, look.now), holds)
        # What a repeated call is refused for says little about the first one, unless there is nothing to be had.
        surely = intent.at == look.now or error.trouble in (Trouble.capacity, Trouble.quota)
        if surely and error.trouble is not Trouble.outage:
            self._done(intent, f"refused: {error}")

    def _change(self, look: Look, intent: Intent) -> None:
        """Starts, stops or terminates one machine."""
        known = look.inventory.known[intent.machine_id or ""]
        calls = {
            ActionKind.terminate: self._driver.terminate,
            ActionKind.stop: self._driver.stop,
            ActionKind.start: self._driver.start,
        }
        if intent.action is not ActionKind.start and not self._seal(known.machine.id):
            self._book.settle(intent.token, "not done: a worker of it has checked in")
            return
        try:
            calls[intent.action](known.machine.id)
        except CloudError as error:
            self._in_vain(look, intent, f"was refused: {error}", error.retry_after or 0)
            start = intent.action is ActionKind.start
            look.refused = look.refused or start
            if not (start and error.trouble is Trouble.outage):  # that may have had its effect
                self._book.settle(intent.token, f"refused: {error}")
                return
        self._asked[intent.token] = (look.now, look.now)
        if intent.action is ActionKind.start:
            known = replace(known, started_at=look.now, draining_since=None, reason=None)
        else:
            if not known.registered_at and not known.adopted and known.reason is None:
                self._never_checked_in(known.machine.id, look.inventory)
            known = replace(known, reason=intent.reason)
        look.inventory.put(known)
        self._remember(look.inventory)

    def _in_vain(self, look: Look, intent: Intent, what: str, seconds: float = 0) -> None:
        """A call has done nothing for a machine: written down once, and tried again later each time."""
        machine_id, text = intent.machine_id or "", f"{intent.action.value} {what}"
        times, _, before = self._vain.get(machine_id, (0, intent.action, ""))
        if text != before:
            self._book.note(Kind.trouble, text, machine_id=machine_id)
        self._vain[machine_id] = (times + 1, intent.action, text)
        wait = min(self._patience.ask_again * 2 ** min(times, 10), self._patience.most)
        self._not_before[machine_id] = look.now + max(wait, timedelta(seconds=seconds))

    # -- holds and words ---------------------------------------------------------------------------------------

    def _hold(self, hold: Hold, before: Sequence[Hold]) -> None:
        old = holding.find(before, hold.zone, hold.purchase)
        self._book.hold(hold)
        same = old is not None and holding.gist(old.reason) == holding.gist(hold.reason)
        if hold.until > self._clock() and not same:
            self._book.note(
                Kind.trouble, f"{hold.reason}; tried again at {hold.until:%H:%M:%S} UTC"
            )

    def _release(self, hold: Hold, why: str) -> None:
        self._book.release(hold.zone, hold.purchase)
        self._book.note(Kind.cleared, f"{why}; before: {hold.reason}")

    def _outcome(self, look: Look, decided: Plan) -> Outcome:
        holds = self._book.holds()
        trouble = decided.shortfall
        if trouble is None and not sum(look.load.waiting.values()):
            trouble = next(self._strangers.troubles(), None)
            vain = self._vain.items()
            stuck = {one: text for one, (_, kind, text) in vain if kind is not ActionKind.start}
            trouble = trouble or next(seeing.odd_ones(look, stuck, self._patience), None)
        trouble = trouble or holding.unanswered(holds, self._launch_intents(), look.now)
        soon = [look.now + self._patience.list_every] if self._book.intents() else []
        due = (
            *soon,
            *(hold.until for hold in holds),
            *seeing.due_times(look.inventory.known.values(), look, self._patience),
        )
        return Outcome(
            summary=decided.summary,
            decisions=tuple(look.decisions),
            drain=look.drain,
            dead=look.inventory.dead,
            trouble=trouble,
            next_look=min((at for at in due if at > look.now), default=None),
        )
