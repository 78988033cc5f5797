"""Decides which agents to start and which to drain; no I/O.

Assumptions: an agent counts once it has checked in, or as pending for `boot_seconds` after its start; a busy agent
is never touched; intent is recomputed from what is observed at each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True, kw_only=True)
class AgentSeen:
    """One agent: launched by us (`launched_at`) and, once it has checked in, its load."""

    name: str
    launched_at: datetime
    checked_in: bool = False
    slots: int = 1
    busy: int = 0
    draining: bool = False
    idle_since: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class GroupPolicy:
    min_agents: int = 0
    max_agents: int = 1
    slots: int = 1
    grace: timedelta = timedelta(minutes=15)  # idle time before an agent goes (E-01)
    boot: timedelta = timedelta(seconds=60)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`reasons` has one line per action, for logs and people."""

    start: int = 0
    drain: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


def plan(*, waiting: int, agents: list[AgentSeen], policy: GroupPolicy, now: datetime) -> Plan:
    """E-05: enough agents for what waits and runs, within the limits; idle ones go after the grace."""
    serving = [agent for agent in agents if not agent.draining]
    free = sum(_free_slots(agent, policy, now) for agent in serving)
    missing = max(0, -(-(waiting - free) // policy.slots))
    start = max(missing, policy.min_agents - len(serving))
    start = max(0, min(start, policy.max_agents - len(agents)))
    idle = [a for a in serving if _overdue(a, policy, now)] if waiting == 0 else []
    drain = tuple(a.name for a in idle[: max(0, len(serving) - policy.min_agents)])
    reasons = [f"start {start}: {waiting} waiting, {free} free slots"] if start else []
    reasons += [f"drain {name}: idle for {policy.grace}" for name in drain]
    return Plan(start=start, drain=drain, reasons=tuple(reasons))


def _free_slots(agent: AgentSeen, policy: GroupPolicy, now: datetime) -> int:
    if agent.checked_in:
        return max(0, agent.slots - agent.busy)
    return policy.slots if now - agent.launched_at < policy.boot else 0


def _overdue(agent: AgentSeen, policy: GroupPolicy, now: datetime) -> bool:
    return (
        agent.busy == 0 and agent.idle_since is not None and now - agent.idle_since >= policy.grace
    )
