"""What an execution waits for or does right now, in words, and the next step. Pure: facts in, an explanation out.

The same words are in `valohai-dagster why`, in the debug info of Dagster's run monitoring and in engine events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from valohai_agent.protocol import Worker
from valohai_dagster.executions.capacity_state import CapacityState
from valohai_dagster.executions.stream import ExecutionStatus as Status
from valohai_dagster.executions.waiting import Wait, counted, explain_wait, lasting, since
from valohai_dagster.executions.waiting_machines import explain_machines

NEXT_CONDUCTOR = "start one on the control plane: `valohai-dagster conductor` (`valohai-dagster doctor` checks it)"
NEXT_DOCTOR = (
    "`valohai-dagster doctor` checks workers and services; launch it again when it is green"
)
MAX_WARNINGS = 5  # that are told; the metadata of the asset has all
NEXT_LOGS = (
    "`valohai-dagster logs`, or the stdout and stderr tabs of the step, for the complete log"
)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where one execution, step or run stands. `state` is one word for programs, `text` one line for people."""

    state: str
    text: str
    subject: str = ""  # `digits#12 train`
    next_step: str | None = None
    details: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # the same for programs, as JSON

    def __str__(self) -> str:
        """One line: what it is about, where it stands, and the next step."""
        line = f"{self.subject}: {self.text}" if self.subject else self.text
        return line if self.next_step is None else f"{line}. Next: {self.next_step}"

    def lines(self) -> list[str]:
        """The same and the details, for a terminal or a longer text."""
        first = f"{self.subject}: {self.text}" if self.subject else self.text
        more = [*self.details, *([f"next: {self.next_step}"] if self.next_step else [])]
        return [first, *(f"  {line}" for line in more)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "subject": self.subject,
            "state": self.state,
            "text": self.text,
            "next": self.next_step,
            "details": list(self.details),
            **self.facts,
        }


Conductor = Literal["there", "elsewhere", "nobody"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of one execution at one moment."""

    id: str
    label: str  # `digits#12 train`
    run_id: str | None = None
    status: Status
    group: str
    now: datetime
    # from the records
    attempt: int = 1
    reason: str | None = None
    status_detail: str | None = None
    exit_code: int | None = None
    stop_requested: int = 0
    created_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    worker: str | None = None
    host: str | None = None
    leased_at: datetime | None = None
    suspected_at: datetime | None = None
    losses: tuple[str, ...] = ()  # why earlier attempts ended, oldest first
    shard: int = 0
    # from settings
    group_kind: Literal["local", "static", "cloud", "unknown"] = "static"
    max_agents: int | None = None
    lost_grace_seconds: float = 300.0
    # from Redis
    redis_away: str | None = None  # why nothing of the following is known
    conductor: Conductor = (
        "there"  # who looks after the shard: a conductor, none yet, none that lives
    )
    ahead: int | None = None  # jobs before it; None when it is not in the queue
    lease_worker: str | None = None  # whose lease is alive
    workers: tuple[Worker, ...] = ()
    machines: CapacityState | None = None  # of a group whose machines come and go
    phase: str | None = None
    phase_text: str | None = None  # `pulling 63 %`
    phase_since: datetime | None = None
    acknowledged: str | None = None  # what the worker said when the stop reached the command
    warnings: tuple[str, ...] = ()  # kept with it, oldest first
    # others, for people
    ahead_of_it: tuple[str, ...] = ()  # labels of the first few in the queue
    on_the_slots: tuple[str, ...] = ()  # labels of a few that run in the group


def explain_execution(facts: Facts) -> Explanation:
    """Where the execution stands and what to do about it."""
    if facts.status.final:
        found = _ended(facts)
    elif facts.redis_away:
        found = _without_redis(facts)
    elif facts.stop_requested:
        found = _stopping(facts)
    elif facts.status is Status.created:
        found = _created(facts)
    elif facts.status is Status.queued:
        found = _queued(facts)
    else:
        found = _suspected(facts) if facts.suspected_at else _running(facts)
    if not facts.status.final:
        found = _without_conductor(facts, found)
        found = replace(found, details=(*found.details, *_remarks(facts)))
    found = replace(found, details=(*found.details, *_warnings(facts)))
    return replace(found, subject=facts.label, facts=_machine_facts(facts))


def _created(facts: Facts) -> Explanation:
    if facts.reason is not None:  # L-10
        more = f"`valohai-dagster groups set {facts.group} ...` raises the quota"
        return Explanation(state="quota", text=facts.reason, next_step=f"wait; {more}")
    text = "accepted and not queued yet: the conductor resolves its inputs"
    return Explanation(state="created", text=text)


def _queued(facts: Facts) -> Explanation:
    if facts.lease_worker is not None:
        text = (
            f"worker {facts.lease_worker} has just taken it from the queue of group {facts.group}"
        )
        return Explanation(state="taken", text=text)
    if facts.group_kind == "unknown":
        return Explanation(
            state="no-group",
            text=f"it waits in the queue of group {facts.group}, which valohai.toml does not have any more",
            next_step=f"put [groups.{facts.group}] back, or stop the run and choose another environment",
        )
    if facts.ahead is None:
        text = f"neither in the queue of group {facts.group} nor with a worker; the conductor queues it again"
        return Explanation(state="missing", text=text)
    wait = _wait(facts, facts.ahead)
    details = []
    if facts.ahead_of_it:
        more = facts.ahead - len(facts.ahead_of_it)
        details.append("ahead: " + _some(facts.ahead_of_it, more))
    if facts.on_the_slots and wait.state in ("busy", "draining", "at-maximum"):
        running = sum(worker.busy for worker in facts.workers) - len(facts.on_the_slots)
        details.append("on the slots: " + _some(facts.on_the_slots, running))
    return Explanation(
        state=wait.state, text=wait.text, next_step=wait.next_step, details=tuple(details)
    )


def _wait(facts: Facts, ahead: int) -> Wait:
    if facts.group_kind == "cloud":
        return explain_machines(
            facts.group, facts.workers, facts.machines, ahead=ahead, now=facts.now
        )
    return explain_wait(
        facts.group,
        facts.workers,
        local=facts.group_kind == "local",
        ahead=ahead,
        max_agents=facts.max_agents,
    )


def _running(facts: Facts) -> Explanation:
    doing = facts.phase_text or facts.phase or "starting"
    if facts.phase_since is not None:
        doing += f" {since(facts.phase_since, facts.now)}"
    return Explanation(state=facts.phase or "leased", text=f"{doing}, leased by {_who(facts)}")


def _suspected(facts: Facts) -> Explanation:
    assert facts.suspected_at is not None
    again = facts.suspected_at + timedelta(seconds=facts.lost_grace_seconds)
    left = (again - facts.now).total_seconds()
    then = f"in {lasting(left)}" if left > 0 else "now"
    return Explanation(
        state="suspected",
        text=f"no sign of life from {_who(facts)}, suspected lost {since(facts.suspected_at, facts.now)}; it may "
        f"still be computing, and another attempt starts {then} unless it comes back",
        next_step="look after that machine and its network, or stop the run",
    )


def _stopping(facts: Facts) -> Explanation:
    word = "hard stop" if facts.stop_requested > 1 else "stop"
    why = f" ({facts.reason})" if facts.reason else ""
    if facts.worker is None:
        return Explanation(
            state="stopping", text=f"{word} requested{why}: it is being taken out of the queue"
        )
    if facts.acknowledged:
        text = f"{word} requested{why}: {facts.acknowledged}; its end and its outputs are awaited"
        harder = "terminate it once more to kill the command" if facts.stop_requested == 1 else None
        return Explanation(state="stop-acknowledged", text=text, next_step=harder)
    return Explanation(
        state="stop-sent",
        text=f"{word} requested{why}: sent to {_who(facts)}, which has not acknowledged it yet",
        next_step="if that lasts the worker is out of reach: look after its machine",
    )


def _ended(facts: Facts) -> Explanation:
    began = facts.started_at or facts.created_at
    took = (facts.ended_at - began).total_seconds() if facts.ended_at and began else None
    after = f" after {lasting(took)}" if took is not None else ""
    code = f" (exit code {facts.exit_code})" if facts.exit_code else ""
    why = f": {facts.reason}" if facts.reason else ""
    if facts.status is Status.complete:
        return Explanation(state="complete", text=f"complete{after}")
    if facts.status is Status.stopped:
        return Explanation(state="stopped", text=f"stopped{after}{why}")
    if facts.status is Status.crashed:
        return Explanation(state="crashed", text=f"crashed{after}{why}", next_step=NEXT_DOCTOR)
    never_ran = facts.started_at is None
    return Explanation(
        state="error",
        text=f"refused{why}"
        if never_ran
        else f"failed{after}{why}{code if code not in why else ''}",
        next_step="correct this and launch it again; nothing was started"
        if never_ran
        else NEXT_LOGS,
    )


def _without_redis(facts: Facts) -> Explanation:
    where = f" with {_who(facts)}" if facts.worker else f" in group {facts.group}"
    return Explanation(
        state="no-redis",
        text=f"{facts.status.value}{where} as far as the records know; Redis is away ({facts.redis_away})",
        next_step="agents go on and report when it is back; `valohai-dagster doctor` checks it",
    )


def _without_conductor(facts: Facts, found: Explanation) -> Explanation:
    """Without one nothing is resolved, granted or applied; what runs goes on."""
    if facts.conductor == "there":
        return found
    if facts.conductor == "elsewhere":
        text = f"no conductor holds its shard {facts.shard} at this moment; one that lives takes it over in seconds"
        return replace(found, details=(*found.details, text))
    meanwhile = (
        "its results are applied when one is back"
        if facts.worker
        else "nothing happens without one"
    )
    return replace(
        found,
        state="no-conductor",
        text=f"no conductor is running, and {meanwhile}; last known: {found.text}",
        next_step=NEXT_CONDUCTOR,
    )


def _remarks(facts: Facts) -> list[str]:
    remarks = []
    if facts.losses:
        remarks.append(f"attempt {facts.attempt}; before: " + "; ".join(facts.losses))
    if facts.status_detail:
        remarks.append(f"the command says: {facts.status_detail}")
    return remarks


def _warnings(facts: Facts) -> list[str]:
    """What was said before it was queued and while it ran, such as inputs that have changed (I-32)."""
    shown = [f"warning: {text}" for text in facts.warnings[:MAX_WARNINGS]]
    more = len(facts.warnings) - len(shown)
    return [*shown, f"and {counted(more, 'more warning')}"] if more > 0 else shown


def _who(facts: Facts) -> str:
    host = f" on host {facts.host}" if facts.host else ""
    began = f" {since(facts.leased_at, facts.now)}" if facts.leased_at else ""
    return f"worker {facts.worker}{host}{began}"


def _some(labels: tuple[str, ...], more: int) -> str:
    return ", ".join(labels) + (f" and {counted(more, 'other')}" if more > 0 else "")


def _machine_facts(facts: Facts) -> dict[str, Any]:
    def when(moment: datetime | None) -> str | None:
        return moment.isoformat() if moment else None

    return {
        "execution": facts.id,
        "run": facts.run_id,
        "status": facts.status.value,
        "group": facts.group,
        "attempt": facts.attempt,
        "ahead": facts.ahead,
        "worker": facts.worker or facts.lease_worker,
        "host": facts.host,
        "leased_at": when(facts.leased_at),
        "machines": facts.machines.model_dump(mode="json") if facts.machines else None,
        "phase": facts.phase,
        "suspected_at": when(facts.suspected_at),
        "conductor": facts.conductor,
    }
