"""One transaction of the service: what it changes in the records, and in memory once it is committed.

Changes of single rows wait until `flush`, so that many reports become few statements. Before the commit the fence of
every shard that was touched is compared with ours: what a conductor does that has lost a shard without knowing it, is
undone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from datetime import datetime
from functools import cache
from typing import Any, TypeVar

import sqlalchemy as sa

from valohai_dagster.errors import ServiceUnavailable
from valohai_dagster.executions import ledger
from valohai_dagster.executions.memory import Active, Details, Grant, Memory, Metrics
from valohai_dagster.executions.spec_model import CommitRef
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records

T = TypeVar("T")

_INSERTS = (t.executions, t.attempts, t.execution_inputs, t.grants, t.datums, t.metadata_events)
MANY_NAMES = 200  # metrics of one execution; with more of them their latest values are read again
MANY_FILES = 50  # inputs of one execution; with more of them its details are read again


class ShardLost(ServiceUnavailable):
    """Another conductor has taken the shard over; this one must not act for it any more."""

    def __init__(self, shard: int) -> None:
        super().__init__(f"another conductor has taken over shard {shard}")
        self.shard = shard


class Writing:
    """Use `transact`. Opens its connection only when something is read or changed."""

    def __init__(self, records: Records, memory: Memory, now: datetime, stack: ExitStack) -> None:
        self.now = now
        self._records = records
        self._memory = memory
        self._stack = stack
        self._conn: sa.Connection | None = None
        self._changed: dict[str, Active] = {}
        self._details: dict[str, Details] = {}
        self._metrics: dict[str, Metrics] = {}
        self._projects: dict[str, str] = {}
        self._commits: set[str] = set()
        self._grants: dict[str, Grant] = {}
        self._accepted: set[str] = set()  # grants that were used up
        self._accept_later: list[str] = []
        self._touched: set[int] = set()
        self._inserts: dict[sa.Table, list[dict[str, Any]]] = {}
        self._updates: dict[tuple[str, int | None], dict[str, Any]] = {}

    @property
    def conn(self) -> sa.Connection:
        if self._conn is None:
            self._conn = self._stack.enter_context(self._records.write())
        return self._conn

    # -- what is known -----------------------------------------------------------------------------------------
    def find(self, execution_id: str) -> Active | None:
        """The execution as this transaction sees it, an ended one too; None if there is none."""
        known = self._changed.get(execution_id) or self._memory.active.get(execution_id)
        return known or ledger.active_of(self.conn, execution_id)

    def details(self, execution_id: str) -> Details:
        found = self._details.get(execution_id) or self._memory.details.get(execution_id)
        if found is None:
            self.flush()
            found = ledger.details_of(self.conn, execution_id)
            self.keep_details(found)
        return found

    def metrics(self, execution_id: str) -> Metrics:
        found = self._metrics.get(execution_id) or self._memory.metrics.get(execution_id)
        if found is None:
            self.flush()
            found = ledger.metrics_of(self.conn, execution_id)
        return found

    def project(self, name: str) -> str:
        """The project's id; made when it is new."""
        found = self._projects.get(name) or self._memory.projects.get(name)
        if found is None:
            found = self._projects[name] = ledger.ensure_project(self.conn, name, self.now)
        return found

    def ensure_commit(self, project_id: str, commit: CommitRef) -> None:
        key = f"{project_id}/{commit.identifier}"
        if key not in self._commits and not self._memory.commits.get(key):
            ledger.ensure_commit(self.conn, project_id, commit, self.now)
            self._commits.add(key)

    def is_mine(self, shard: int) -> bool:
        """Whether we look after that shard, as far as we know; `check` makes sure."""
        return shard in self._memory.fences

    # -- what changes ------------------------------------------------------------------------------------------
    def change(self, active: Active, **values: Any) -> Active:
        """The execution with other values, in memory only; `update` is for the records."""
        changed = replace(active, **values)
        self._changed[active.id] = changed
        return changed

    def keep_details(self, details: Details) -> None:
        if details.files <= MANY_FILES:
            self._details[details.id] = details

    def keep_metrics(self, execution_id: str, metrics: Metrics) -> None:
        self._metrics[execution_id] = metrics

    def add_grants(self, active: Active, grants: Sequence[Mapping[str, Any]]) -> None:
        """Rows of `vh_grants`."""
        self.insert(active, t.grants, *map(dict, grants))
        for row in grants:
            known = {field.name: row[field.name] for field in fields(Grant)}
            self._grants[row["upload_id"]] = Grant(**known)

    def accept_grants(self, active: Active, upload_ids: Sequence[str], kind: str) -> list[Grant]:
        """Uses up the grants; those that this attempt was never given, or has used before, are left out."""
        found, unknown = list[Grant](), list[str]()
        for upload_id in upload_ids:
            if upload_id in self._accepted:
                continue
            grant = self._grants.get(upload_id) or self._memory.grants.get(upload_id)
            if grant is None:
                unknown.append(upload_id)
            elif (grant.execution_id, grant.attempt, grant.kind) == (
                active.id,
                active.attempt,
                kind,
            ):
                found.append(grant)
                self._accept_later.append(upload_id)
        if unknown:
            found += ledger.accept_grants(self.touch(active), active, unknown, kind)
        self._touched.add(active.shard)
        self._accepted.update(grant.upload_id for grant in found)
        return found

    def update(self, active: Active, **values: Any) -> None:
        self._touched.add(active.shard)
        self._updates.setdefault((active.id, None), {}).update(values)

    def update_attempt(self, active: Active, number: int, **values: Any) -> None:
        self._touched.add(active.shard)
        self._updates.setdefault((active.id, number), {}).update(values)

    def insert(self, active: Active, table: sa.Table, *rows: dict[str, Any]) -> None:
        """Rows of that execution; all rows of a table have the same columns."""
        self._touched.add(active.shard)
        self._inserts.setdefault(table, []).extend(rows)

    def touch(self, active: Active, *tables: sa.Table) -> sa.Connection:
        """For statements of one's own on the execution; they see rows that were inserted into `tables` before."""
        self._touched.add(active.shard)
        if any(table in self._inserts for table in tables):
            self.flush()
        return self.conn

    # -- the end -----------------------------------------------------------------------------------------------
    def flush(self) -> None:
        for table in _INSERTS:
            if rows := self._inserts.pop(table, None):
                self.conn.execute(table.insert(), rows)
        if self._accept_later:
            ledger.mark_accepted(self.conn, self._accept_later)
            self._accept_later = []
        updates, self._updates = self._updates, {}
        batches: dict[tuple[bool, tuple[str, ...]], list[dict[str, Any]]] = {}
        for (execution_id, number), values in updates.items():
            parameters = {f"v_{name}": value for name, value in values.items()}
            key = (number is not None, tuple(sorted(values)))
            batches.setdefault(key, []).append(
                {"k_id": execution_id, "k_number": number, **parameters}
            )
        for (of_attempt, names), rows in batches.items():
            statement = _update_attempts(names) if of_attempt else _update_executions(names)
            self.conn.execute(statement, rows if len(rows) > 1 else rows[0])

    def check(self, fences: Mapping[int, int]) -> None:
        """Raises `ShardLost` unless all touched shards are ours, and keeps them so until the transaction ends."""
        if not self._touched:
            return
        found = ledger.fences_of(self.conn, self._touched)
        for shard in self._touched:
            if shard not in fences or found.get(shard) != fences[shard]:
                raise ShardLost(shard)

    def settle(self) -> None:
        """The transaction is committed."""
        for details in self._details.values():
            self._memory.details.put(details.id, details)
        for upload_id, grant in self._grants.items():
            self._memory.grants.put(upload_id, grant)
        for upload_id in self._accepted:
            self._memory.grants.drop(upload_id)
        for name, project_id in self._projects.items():
            self._memory.projects.put(name, project_id)
        for key in self._commits:
            self._memory.commits.put(key, True)
        for execution_id, metrics in self._metrics.items():
            if len(metrics.latest) <= MANY_NAMES:
                self._memory.metrics.put(execution_id, metrics)
            else:
                self._memory.metrics.drop(execution_id)
        self._memory.settle(self._changed)


def transact(
    records: Records,
    memory: Memory,
    fences: Mapping[int, int],
    now: datetime,
    change: Callable[[Writing], T],
) -> T:
    """Commits all that `change` did, or nothing. `fences`: the shards that are ours, with their fences."""
    with ExitStack() as stack:
        writing = Writing(records, memory, now, stack)
        result = change(writing)
        writing.flush()
        writing.check(fences)
    writing.settle()
    return result


@cache
def _update_executions(names: tuple[str, ...]) -> sa.Update:
    c = t.executions.c
    values = {name: sa.bindparam(f"v_{name}") for name in names}
    return t.executions.update().where(c.id == sa.bindparam("k_id")).values(values)


@cache
def _update_attempts(names: tuple[str, ...]) -> sa.Update:
    c = t.attempts.c
    values = {name: sa.bindparam(f"v_{name}") for name in names}
    mine = sa.and_(c.execution_id == sa.bindparam("k_id"), c.number == sa.bindparam("k_number"))
    return t.attempts.update().where(mine).values(values)
