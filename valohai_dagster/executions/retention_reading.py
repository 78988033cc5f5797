"""Reads what retention decides about: a page at a time, so that a look is bounded however much there is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from valohai_dagster.executions.retention_rules import (
    Item,
    Kind,
    Output,
    Owner,
    Plan,
    age_text,
    cutoff,
    why_output_stays,
    why_owner_keeps,
)
from valohai_dagster.records import tables as t
from valohai_dagster.settings_retention import RetentionSettings

PAGE = 500
MAX_PAGES = 40  # of one kind in one look
CHOSEN = timedelta(hours=2)  # that an archive stays at least for a launch that has chosen it

_E, _P = t.executions.c, t.projects.c
_OWNER = (
    _E.id.label("owner_id"),
    _P.name.label("project"),
    _E.ended_at,
    _E.tags.label("owner_tags"),
    _E.step,
    _E.counter,
)
_D = t.datums.c
_OUTPUTS = (  # with content, or with what is left of it after a cut; of lost attempts too
    sa.select(_D.id.label("cursor"), _D.name, _D.size, _D.tags, _D.purged, *_OWNER)
    .join(t.executions, _E.id == _D.execution_id)
    .join(t.projects, _P.id == _E.project_id)
    .where(_D.adopted.is_(False))
    .where(sa.or_(_D.purged.is_(False), _D.purged_at.is_(None)))
)


@dataclass(frozen=True, kw_only=True)
class _Look:
    """At things of one kind, from `cursor` on; fills the plan up to `most`."""

    conn: sa.Connection
    policy: RetentionSettings
    now: datetime
    plan: Plan
    kind: Kind
    most: int
    cursor: str

    @property
    def is_full(self) -> bool:
        return self.plan.counts[self.kind] >= self.most

    def pages(
        self, query: sa.Select[Any], beyond: Callable[[str], sa.ColumnElement[bool]]
    ) -> Iterator[Sequence[Any]]:
        """Rows of page after page until enough is found; says in the plan where to go on.

        `beyond`: what comes after a cursor in the order of the query. A row's `cursor` is the id of its item.
        """
        cursor = self.cursor
        for _ in range(MAX_PAGES):
            rows = self.conn.execute(query.where(beyond(cursor)).limit(PAGE)).all()
            yield rows
            if self.is_full:
                cursor = self.plan.of(self.kind)[-1].id
                break
            if len(rows) < PAGE:
                return
            cursor = rows[-1].cursor
        self.plan.cursors[self.kind] = cursor

    def old(self) -> sa.ColumnElement[bool]:
        """Executions that may be old enough; the project's own days are looked at afterwards."""
        return _E.ended_at < self.now - timedelta(days=self.policy.shortest(self.kind) or 0)

    def decide(self, owner: Owner, ident: str, name: str, size: int, why: str | None) -> None:
        """`why` it is kept, None if it goes."""
        if why is not None:
            self.plan.kept[why] += 1
        elif not self.is_full:
            age = age_text(self.policy, self.kind, owner, self.now)
            self.add(owner.project, ident, name, size, age)

    def add(self, project: str, ident: str, name: str, size: int, why: str) -> None:
        self.plan.add(
            Item(kind=self.kind, id=ident, project=project, bytes=size, name=name, why=why)
        )


def make_plan(
    conn: sa.Connection,
    policy: RetentionSettings,
    now: datetime,
    *,
    most: int,
    cursors: dict[str, str] | None = None,
) -> Plan:
    """At most `most` things of each kind. With `cursors` of an earlier plan only the kinds that it had not finished."""
    plan = Plan()
    for kind, fill in _FILL.items():
        if policy.shortest(kind) is not None and (not cursors or kind in cursors):
            cursor = (cursors or {}).get(kind, "")
            look = _Look(
                conn=conn, policy=policy, now=now, plan=plan, kind=kind, most=most, cursor=cursor
            )
            fill(look)
    return plan


def _owner(row: Any) -> Owner:
    return Owner(
        id=row.owner_id, project=row.project, ended_at=row.ended_at, tags=row.owner_tags or ()
    )


# -- outputs ---------------------------------------------------------------------------------------------------------


def _outputs(look: _Look) -> None:
    d = t.datums.c
    query = _OUTPUTS.where(look.old()).order_by(d.id)
    for rows in look.pages(query, lambda cursor: d.id > cursor):
        for row, why in _judged(look.conn, look.policy, look.now, rows):
            name = f"{row.name} of {row.step} #{row.counter}"
            look.decide(_owner(row), row.cursor, name, row.size, why)


def staying_outputs(
    conn: sa.Connection, policy: RetentionSettings, now: datetime, ids: Sequence[str]
) -> set[str]:
    """Those of them that have to stay, as things are now."""
    rows = conn.execute(_OUTPUTS.where(t.datums.c.id.in_(ids))).all()
    go = {row.cursor for row, why in _judged(conn, policy, now, rows) if why is None}
    return set(ids) - go


def _judged(
    conn: sa.Connection, policy: RetentionSettings, now: datetime, rows: Sequence[Any]
) -> list[tuple[Any, str | None]]:
    """Rows of `_OUTPUTS` with why they stay; what was begun is brought to its end."""
    facts = _facts_of(conn, [row.cursor for row in rows])
    judged: list[tuple[Any, str | None]] = []
    for row in rows:
        output = facts(row.cursor, _owner(row), bool(row.tags))
        judged.append((row, None if row.purged else why_output_stays(policy, output, now)))
    return judged


def _facts_of(conn: sa.Connection, ids: Sequence[str]) -> Callable[[str, Owner, bool], Output]:
    """Everything that may keep these outputs, in a handful of queries."""
    aliased = _which(conn, t.datum_aliases.c.datum_id, ids)
    in_dataset = _which(conn, t.dataset_files.c.datum_id, ids)
    in_model = _which(conn, t.model_files.c.datum_id, ids)
    readers = _readers(conn, ids)
    named = _named(conn, {reader.id for found in readers.values() for reader in found})

    def output(ident: str, owner: Owner, tagged: bool) -> Output:
        return Output(
            owner=owner,
            readers=readers.get(ident, ()),
            named_readers=named,
            aliased=ident in aliased,
            tagged=tagged,
            in_dataset=ident in in_dataset,
            in_model=ident in in_model,
        )

    return output


def _which(conn: sa.Connection, column: sa.Column[str], ids: Collection[str]) -> set[str]:
    return set(conn.execute(sa.select(column).where(column.in_(ids)).distinct()).scalars())


def _readers(conn: sa.Connection, ids: Sequence[str]) -> dict[str, list[Owner]]:
    i = t.execution_inputs.c
    query = (
        sa.select(i.datum_id, *_OWNER)
        .join(t.executions, _E.id == i.execution_id)
        .join(t.projects, _P.id == _E.project_id)
        .where(i.datum_id.in_(ids))
    )
    found: dict[str, list[Owner]] = defaultdict(list)
    for row in conn.execute(query):
        found[row.datum_id].append(_owner(row))
    return found


def _named(conn: sa.Connection, executions: Collection[str]) -> frozenset[str]:
    """Those that have made something that an alias, a dataset or a model version names."""
    d = t.datums.c
    found: set[str] = set()
    ids = sorted(executions)
    for start in range(0, len(ids), PAGE):
        mine = d.execution_id.in_(ids[start : start + PAGE])
        for table in (t.datum_aliases, t.dataset_files, t.model_files):
            query = sa.select(d.execution_id).join(table, table.c.datum_id == d.id).where(mine)
            found.update(conn.execute(query.distinct()).scalars())
    return frozenset(found)


# -- logs and metadata -------------------------------------------------------------------------------------------------


def _logs(look: _Look) -> None:
    a = t.attempts.c
    query = (
        sa.select(
            (_E.id + "/" + sa.cast(a.number, sa.String)).label("cursor"), a.number, a.logs, *_OWNER
        )
        .join(t.attempts, a.execution_id == _E.id)
        .join(t.projects, _P.id == _E.project_id)
        .where(look.old(), sa.cast(a.logs, sa.Text).like('%"key"%'))
        .order_by(_E.id, a.number)
    )

    def beyond(cursor: str) -> sa.ColumnElement[bool]:
        """A page may end between two attempts of one execution."""
        execution, _, number = cursor.partition("/")
        later = sa.and_(_E.id == execution, a.number > int(number or 0))
        return sa.or_(_E.id > execution, later)

    for rows in look.pages(query, beyond):
        for row in rows:
            stored = {name: log for name, log in (row.logs or {}).items() if log.get("key")}
            name = f"{row.step} #{row.counter}, attempt {row.number}"
            size = sum(int(log.get("size") or 0) for log in stored.values())
            owner = _owner(row)
            why = why_owner_keeps(look.policy, "logs", owner, look.now)
            look.decide(owner, row.cursor, name, size, why)


def _metadata(look: _Look) -> None:
    m = t.metadata_events.c
    query = (
        sa.select(
            _E.id.label("cursor"),
            sa.func.count().label("lines"),
            sa.func.sum(sa.func.length(sa.cast(m["values"], sa.Text))).label("size"),
        )
        .join(t.executions, _E.id == m.execution_id)
        .where(look.old())
        .group_by(_E.id)
        .order_by(_E.id)
    )
    for rows in look.pages(query, lambda cursor: _E.id > cursor):
        owners = _owners(look.conn, [row.cursor for row in rows])
        for row in rows:
            owner, name = owners[row.cursor]
            text = f"{row.lines} lines of {name}"
            why = why_owner_keeps(look.policy, "metadata", owner, look.now)
            look.decide(owner, row.cursor, text, int(row.size or 0), why)


def _owners(conn: sa.Connection, ids: Sequence[str]) -> dict[str, tuple[Owner, str]]:
    query = sa.select(*_OWNER).join(t.projects, _P.id == _E.project_id).where(_E.id.in_(ids))
    return {
        row.owner_id: (_owner(row), f"{row.step} #{row.counter}") for row in conn.execute(query)
    }


# -- code ------------------------------------------------------------------------------------------------------------


def _code(look: _Look) -> None:
    """Archives that no execution has needed for long. The newest of a project is what its code location runs."""
    c = t.commits.c
    query = _archives().order_by(c.id)
    for rows in look.pages(query, lambda cursor: c.id > cursor):
        for row in rows:
            why = _why_archive_stays(look.policy, row, look.now)
            if why is not None:
                look.plan.kept[why] += 1
            elif not look.is_full:
                days = look.policy.days("code", row.project)
                unused = (look.now - _last_use(row)).days
                age = f"last used {unused} days ago, archives are kept for {days:g}"
                name = f"commit {row.identifier[:13]}"
                look.add(row.project, row.cursor, name, row.archive_size or 0, age)


def archive_stays(
    conn: sa.Connection, policy: RetentionSettings, now: datetime, commit_id: str
) -> bool:
    """Whether the archive of that commit has to stay, as things are now."""
    row = conn.execute(_archives().where(t.commits.c.id == commit_id)).one_or_none()
    return row is None or _why_archive_stays(policy, row, now) is not None


def _archives() -> sa.Select[Any]:
    """Commits with all that keeps their archives."""
    c = t.commits.c
    used = sa.and_(_E.project_id == c.project_id, _E.commit == c.identifier)
    newest = (
        sa.select(c.project_id, sa.func.max(c.ctime).label("ctime"))
        .group_by(c.project_id)
        .subquery()
    )
    is_open = sa.and_(_E.id.is_not(None), _E.ended_at.is_(None))
    return (
        sa.select(
            c.id.label("cursor"),
            c.identifier,
            c.archive_size,
            c.ctime,
            c.used_at,
            _P.name.label("project"),
            sa.func.max(_E.ctime).label("last_execution"),
            sa.func.count().filter(is_open).label("open"),
            (newest.c.ctime == c.ctime).label("is_newest"),
        )
        .join(t.projects, _P.id == c.project_id)
        .join(newest, newest.c.project_id == c.project_id)
        .outerjoin(t.executions, used)
        .group_by(c.id, c.identifier, c.archive_size, c.ctime, c.used_at, _P.name, newest.c.ctime)
    )


def _last_use(row: Any) -> datetime:
    """By an execution, or by a launch that has none yet."""
    return max(moment for moment in (row.ctime, row.used_at, row.last_execution) if moment)


def _why_archive_stays(policy: RetentionSettings, row: Any, now: datetime) -> str | None:
    limit = cutoff(policy, "code", row.project, now)
    if row.is_newest:
        return "the newest commit of its project"
    if limit is None or row.open or _last_use(row) >= min(limit, now - CHOSEN):
        return "needed lately"
    return None


_FILL: dict[Kind, Callable[[_Look], None]] = {
    "outputs": _outputs,
    "logs": _logs,
    "metadata": _metadata,
    "code": _code,
}
