"""What has to be said outside once the records say it: to followers, agents, the queue and the streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from valohai_agent.protocol import Command, Job
from valohai_dagster.executions.stream import FollowEvent
from valohai_dagster.executions.wishes import Wish


@dataclass(kw_only=True)
class Outbox:
    """Everything in it may be said twice without harm; it is kept until Redis has taken it."""

    events: list[tuple[str, list[FollowEvent]]] = field(default_factory=list)  # execution, events
    commands: list[tuple[str, str, Command]] = field(default_factory=list)  # group, worker
    grants: list[tuple[str, str, bytes]] = field(default_factory=list)  # group, execution, sealed
    wishes: list[Wish] = field(default_factory=list)  # to be granted outside
    ended: list[tuple[str, str, int]] = field(default_factory=list)  # group, execution, attempt
    posts: list[tuple[str, dict[Any, Any]]] = field(default_factory=list)  # stream, entry
    handled: dict[str, list[str]] = field(default_factory=dict)  # stream, entries that are done
    queued: set[str] = field(default_factory=set)  # groups that have got new jobs
    stops_sent: list[str] = field(default_factory=list)  # executions whose worker has to answer
    stops_answered: list[str] = field(default_factory=list)
    front: list[tuple[Job, int]] = field(default_factory=list)  # to queue before all; priority
    applied: list[str] = field(default_factory=list)  # kinds of reports, for those who count

    def tell(self, execution_id: str, *events: FollowEvent) -> None:
        if events:
            self.events.append((execution_id, list(events)))

    def done(self, stream: str, entry_id: str) -> None:
        self.handled.setdefault(stream, []).append(entry_id)
