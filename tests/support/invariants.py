"""What must hold once a load of runs has ended, whatever died on the way: nothing lost, nothing twice, nothing left.

Reads Dagster's storage and the records in bulk, straight from their one Postgres database.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis
import sqlalchemy as sa

from valohai_agent.protocol import Keys

FINAL = ("SUCCESS", "FAILURE", "CANCELED")
TERMINAL_EVENTS = {
    "PIPELINE_SUCCESS": "SUCCESS",
    "PIPELINE_FAILURE": "FAILURE",
    "PIPELINE_CANCELED": "CANCELED",
}
ONCE_PER_RUN = ("PIPELINE_STARTING", "PIPELINE_START", "PIPELINE_CANCELING")
ONCE_PER_TRY = (  # of a step
    "STEP_WORKER_STARTING", "STEP_WORKER_STARTED", "LOGS_CAPTURED", "STEP_OUTPUT", "HANDLED_OUTPUT",
    "ASSET_MATERIALIZATION",
)  # fmt: skip
STEP_BEGINS = ("STEP_START", "STEP_RESTARTED")
STEP_ENDS = ("STEP_SUCCESS", "STEP_FAILURE", "STEP_SKIPPED")
SHOWN = 12  # findings of each kind that are printed


@dataclass(kw_only=True)
class Findings:
    """Lines of text, one per violation."""

    runs: int = 0
    executions: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # keys, slots and entries that nobody will remove
    restarts: Counter[str] = field(default_factory=Counter)  # why attempts were given up

    @property
    def restarted(self) -> int:
        """Attempts beyond the first: user code ran twice, though its effects count once."""
        return self.restarts.total()

    @property
    def good(self) -> bool:
        return not (self.lost or self.doubled or self.left)

    def __str__(self) -> str:
        parts = [f"{self.runs} runs, {self.executions} executions, {self.restarted} restarted"]
        for name in ("lost", "doubled", "left"):
            lines: list[str] = getattr(self, name)
            parts.append(f"{name}: {len(lines)}")
            parts += [f"  {textwrap.shorten(line, 300)}" for line in lines[:SHOWN]]
        parts += [f"  restarted {number}: {why}" for why, number in self.restarts.most_common()]
        return "\n".join(parts)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the storages say of one run."""

    run_id: str
    status: str
    timed: bool  # start and end are in its row
    events: Counter[tuple[str, str | None]]  # (type, step key)
    state: str | None  # of its row in vh_runs
    executions: Sequence[Any]

    def count(self, kind: str, step: str | None = None) -> int:
        return self.events[kind, step] if step else sum(self._of(kind).values())

    def _of(self, kind: str) -> dict[str | None, int]:
        return {step: n for (name, step), n in self.events.items() if name == kind}

    @property
    def steps(self) -> set[str]:
        return {step for (_, step) in self.events if step}


def check(
    engine: sa.Engine,
    run_ids: Collection[str],
    *,
    expected: Callable[[RunFacts], str] = lambda run: "SUCCESS",
    broker: redis.Redis | None = None,
    deployment: str = "",
) -> Findings:
    """`expected` names the status that the run should have; with `broker` its keys are looked at as well."""
    found = Findings(runs=len(run_ids))
    with engine.connect() as connection:
        facts = {run.run_id: run for run in _facts(connection, run_ids)}
        for run_id in run_ids:
            if run_id not in facts:
                found.lost.append(f"run {run_id} is not in the storage")
        for run in facts.values():
            found.executions += len(run.executions)
            found.lost += _lost(run, expected(run))
            found.doubled += _doubled(run)
        found.lost += _torn(connection, run_ids)
        found.doubled += _doubled_records(connection)
        found.left += _slots(connection)
        found.restarts = _restarts(connection)
    if broker is not None:
        found.left += _keys(broker, deployment)
    return found


# -- one run ----------------------------------------------------------------------------------------------------------


def _lost(run: RunFacts, expected: str) -> Iterator[str]:
    if run.status not in FINAL:
        yield f"run {run.run_id} is {run.status}: {_account(run)}"
        return
    if run.status != expected:
        yield f"run {run.run_id} ended as {run.status} instead of {expected}: {_account(run)}"
    if run.status not in {TERMINAL_EVENTS[k] for k in TERMINAL_EVENTS if run.count(k)}:
        yield f"run {run.run_id} is {run.status} without the event that says so"
    if not run.timed:
        yield f"run {run.run_id} is {run.status} without times of its start and end"
    if run.state not in (None, "ended"):
        yield f"run {run.run_id} is {run.status}, but vh_runs says {run.state}"
    for execution in run.executions:
        if execution.ended_at is None:
            yield f"execution {execution.id} of the ended run {run.run_id} is {execution.status}"
    if run.status == "SUCCESS":
        yield from _lost_of_success(run)


def _lost_of_success(run: RunFacts) -> Iterator[str]:
    for step in run.steps:
        for kind in ("STEP_START", "STEP_SUCCESS", "STEP_OUTPUT"):
            if not run.count(kind, step):
                yield f"run {run.run_id} has no {kind} of {step}"
    planned = run.count("ASSET_MATERIALIZATION_PLANNED")
    if run.count("ASSET_MATERIALIZATION") < planned:
        yield f"run {run.run_id} materialized fewer assets than planned: {_account(run)}"
    if not run.steps:
        yield f"run {run.run_id} succeeded without a step"


def _doubled(run: RunFacts) -> Iterator[str]:
    ends = {kind: run.count(kind) for kind in TERMINAL_EVENTS if run.count(kind)}
    if sum(ends.values()) > 1:
        yield f"run {run.run_id} ended more than once: {ends}"
    for kind in ONCE_PER_RUN:
        if run.count(kind) > 1:
            yield f"run {run.run_id} has {run.count(kind)} {kind}"
    for step in run.steps:
        yield from _doubled_step(run, step)
    seen = Counter((e.step_key, e.retry_number) for e in run.executions)
    for (step, number), count in seen.items():
        if count > 1:
            yield f"run {run.run_id} has {count} executions of {step}, try {number}"


def _doubled_step(run: RunFacts, step: str) -> Iterator[str]:
    tries = 1 + run.count("STEP_UP_FOR_RETRY", step)
    limits = {**dict.fromkeys(ONCE_PER_TRY, tries), "STEP_START": 1, "STEP_RESTARTED": tries - 1}
    for kind, most in limits.items():
        if run.count(kind, step) > most:
            yield f"step {step} of run {run.run_id} has {run.count(kind, step)} {kind}, not {most}"
    ends = sum(run.count(kind, step) for kind in STEP_ENDS)
    if ends > 1:
        yield f"step {step} of run {run.run_id} ended {ends} times"


def _account(run: RunFacts) -> str:
    """For the eye: what there is of a run that is not as it should be."""
    events = ", ".join(f"{n} {kind}" for (kind, _), n in run.events.items())
    executions = ", ".join(f"{e.id} {e.status}: {e.reason}" for e in run.executions)
    return f"[{events}] [{executions or 'no execution'}] vh_runs: {run.state}"


# -- queries ----------------------------------------------------------------------------------------------------------


def _facts(connection: sa.Connection, run_ids: Collection[str]) -> Iterator[RunFacts]:
    ids = {"ids": list(run_ids)}
    events: dict[str, Counter[tuple[str, str | None]]] = {}
    query = sa.text(
        "SELECT run_id, dagster_event_type, step_key, count(*) FROM event_logs"
        " WHERE run_id = ANY(:ids) AND dagster_event_type IS NOT NULL GROUP BY 1, 2, 3"
    )
    for run_id, kind, step, count in connection.execute(query, ids):
        # The materialization is planned at the creation of the run, so it is no trace of its step.
        step = None if kind == "ASSET_MATERIALIZATION_PLANNED" else step
        events.setdefault(run_id, Counter())[kind, step] += count
    executions: dict[str, list[Any]] = {}
    query = sa.text(
        "SELECT id, run_id, step_key, retry_number, status, reason, ended_at FROM vh_executions"
        " WHERE run_id = ANY(:ids)"
    )
    for row in connection.execute(query, ids):
        executions.setdefault(row.run_id, []).append(row)
    states = _states(connection)
    query = sa.text(
        "SELECT run_id, status, start_time IS NOT NULL AND end_time IS NOT NULL FROM runs"
        " WHERE run_id = ANY(:ids)"
    )
    for run_id, status, timed in connection.execute(query, ids):
        yield RunFacts(
            run_id=run_id,
            status=status,
            timed=timed,
            events=events.get(run_id, Counter()),
            state=states.get(run_id),
            executions=executions.get(run_id, []),
        )


def _states(connection: sa.Connection) -> dict[str, str]:
    if not sa.inspect(connection).has_table("vh_runs"):
        return {}
    rows = connection.execute(sa.text("SELECT run_id, state FROM vh_runs"))
    return {row.run_id: row.state for row in rows}


def _torn(connection: sa.Connection, run_ids: Collection[str]) -> Iterator[str]:
    """Events whose row is there, but not what Dagster's storage writes in its next commits."""
    untagged = sa.text(
        "SELECT e.id, e.run_id, e.step_key FROM event_logs e WHERE e.run_id = ANY(:ids)"
        " AND e.dagster_event_type = 'ASSET_MATERIALIZATION'"
        " AND NOT EXISTS (SELECT 1 FROM asset_event_tags g WHERE g.event_id = e.id)"
    )
    for event_id, run_id, step in connection.execute(untagged, {"ids": list(run_ids)}):
        yield f"the materialization {event_id} of {step} in run {run_id} has no tags"
    behind = sa.text(
        "SELECT e.asset_key, max(e.id) FROM event_logs e LEFT JOIN asset_keys k ON k.asset_key = e.asset_key"
        " WHERE e.run_id = ANY(:ids) AND e.dagster_event_type = 'ASSET_MATERIALIZATION'"
        " AND (k.last_materialization IS NULL) GROUP BY 1"
    )
    for key, event_id in connection.execute(behind, {"ids": list(run_ids)}):
        yield f"the asset index of {key} does not know of materialization {event_id}"


def _doubled_records(connection: sa.Connection) -> Iterator[str]:
    datums = sa.text(
        "SELECT execution_id, name, count(*) FROM vh_datums WHERE execution_id IS NOT NULL"
        " GROUP BY 1, 2 HAVING count(*) > 1"
    )
    for execution_id, name, count in connection.execute(datums):
        yield f"execution {execution_id} has {count} outputs {name}"
    tags = sa.text(
        "SELECT event_id, key, count(*) FROM asset_event_tags GROUP BY 1, 2 HAVING count(*) > 1"
    )
    for event_id, key, count in connection.execute(tags):
        yield f"materialization {event_id} has the tag {key} {count} times"


def _slots(connection: sa.Connection) -> Iterator[str]:
    slots = sa.text(
        "SELECT concurrency_key, run_id FROM concurrency_slots WHERE run_id IS NOT NULL AND NOT deleted"
    )
    for pool, run_id in connection.execute(slots):
        yield f"a slot of pool {pool} is still held by run {run_id}"
    pending = sa.text("SELECT concurrency_key, run_id, step_key FROM pending_steps")
    for pool, run_id, step in connection.execute(pending):
        yield f"step {step} of run {run_id} is still in the line of pool {pool}"


def _restarts(connection: sa.Connection) -> Counter[str]:
    query = sa.text(
        "SELECT regexp_replace(o.reason, 'worker (?!took)[^ ]+', 'a worker') FROM vh_attempts n"
        " JOIN vh_attempts o ON o.execution_id = n.execution_id AND o.number = n.number - 1"
    )
    return Counter(str(reason) for (reason,) in connection.execute(query))


def _keys(broker: redis.Redis, deployment: str) -> Iterator[str]:
    """Jobs, leases and grants of ended executions, and entries that nobody has read."""
    start = Keys(deployment).group_prefix("").removesuffix("{}:")
    for key in broker.scan_iter(match=f"{start}*", count=1000):
        name = key.decode() if isinstance(key, bytes) else str(key)
        part = name.removeprefix(start).rsplit("}:", 1)[-1]
        word = part.split(":")[0]
        if word in ("job", "lease", "grant"):
            yield f"the key {part} is left in Redis"
        elif word in ("reports", "submissions", "runs") and broker.xlen(name):
            yield f"{broker.xlen(name)} entries are left in {part}"
        elif word == "ready" and broker.zcard(name):
            yield f"{broker.zcard(name)} executions are left in the queue"
