"""Tells those who wait in a queue why: at once when no machine can come, of other reasons when they wait for long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from valohai_agent.protocol import Worker
from valohai_dagster.executions.capacity_state import CapacityState, states_of
from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.executions.memory import Active
from valohai_dagster.executions.outbox import Outbox
from valohai_dagster.executions.stream import EventKind, FollowEvent
from valohai_dagster.executions.waiting import Wait, explain_wait
from valohai_dagster.executions.waiting_machines import AT_ONCE, explain_machines
from valohai_dagster.settings_groups import CloudGroupSettings

LONG_WAIT = timedelta(seconds=15)  # in the queue, before the reason is told
TOLD_AT_ONCE = 500  # waiting executions that are told the reason in one look


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What a waiting execution was told last: the reason's state, and of troubles what they are."""

    state: str
    gist: str | None = None

    @property
    def trouble(self) -> bool:
        return self.state in AT_ONCE


class WaitTelling:
    """`look` about once a second with all waiting executions of our shards."""

    def __init__(self, core: ServiceCore, is_local: Callable[[str], bool]) -> None:
        self._core = core
        self._is_local = is_local
        self._since: dict[str, datetime] = {}
        self._told: dict[str, _Told] = {}

    async def look(self, queued: Sequence[Active]) -> None:
        """Each is told again only when it has become another reason, and when a trouble is over."""
        now = self._core.clock()
        self._since = {a.id: self._since.get(a.id, now) for a in queued}
        self._told = {a.id: self._told[a.id] for a in queued if a.id in self._told}
        machines = await self._machines(queued)
        left = TOLD_AT_ONCE
        for group in sorted({active.group for active in queued}):
            mine = [active for active in queued if active.group == group]
            long = [a for a in mine if self._is_long(a, now) or self._had_trouble(a)]
            if group in machines:
                state = machines[group]
                urgent = state is not None and (state.trouble is not None or not state.enabled)
                some = mine if urgent else long
            else:
                some = long
            if some and left > 0:
                left -= await self._tell(group, some, machines, now, left)

    def _had_trouble(self, active: Active) -> bool:
        return active.id in self._told and self._told[active.id].trouble

    async def _machines(self, queued: Sequence[Active]) -> dict[str, CapacityState | None]:
        core = self._core
        groups = {active.group for active in queued}
        clouds = [
            name
            for name in sorted(groups)
            if isinstance(core.settings.groups.get(name), CloudGroupSettings)
        ]
        found = await states_of(core.dispatch.redis, core.keys, clouds)
        return {name: found.get(name) for name in clouds}

    async def _tell(
        self,
        group: str,
        actives: Sequence[Active],
        machines: dict[str, CapacityState | None],
        now: datetime,
        most: int,
    ) -> int:
        """How many were told something."""
        core = self._core
        workers = list((await core.dispatch.workers(group)).values())
        state = machines.get(group)
        explain = self._explainer(group, workers, machines, now)
        reason = explain(0)
        news = _Told(
            state=reason.state, gist=state.gist if state and reason.state in AT_ONCE else None
        )
        told = [
            active
            for active in actives
            if self._told.get(active.id) != news and self._is_due(active, news, now)
        ][:most]
        places = await core.dispatch.positions(group, [active.id for active in told])
        outbox = Outbox()
        for active, ahead in zip(told, places, strict=True):
            over = self._had_trouble(active) and not news.trouble
            text = str(explain(ahead or 0))
            text = f"machines can come again; {text}" if over else text
            kind = EventKind.state if over else EventKind.warning
            event = FollowEvent(kind=kind, time=now, attempt=active.attempt, message=text)
            outbox.tell(active.id, event)
            self._told[active.id] = news
        if told:
            await core.deliver(outbox)
        return len(told)

    def _is_due(self, active: Active, news: _Told, now: datetime) -> bool:
        return news.trouble or self._had_trouble(active) or self._is_long(active, now)

    def _is_long(self, active: Active, now: datetime) -> bool:
        return now - self._since[active.id] >= LONG_WAIT

    def _explainer(
        self,
        group: str,
        workers: list[Worker],
        machines: dict[str, CapacityState | None],
        now: datetime,
    ) -> Callable[[int], Wait]:
        if group in machines:
            return lambda ahead: explain_machines(
                group, workers, machines[group], ahead=ahead, now=now
            )
        local = self._is_local(group)
        return lambda ahead: explain_wait(group, workers, local=local, ahead=ahead)
