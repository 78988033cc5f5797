"""Reads what retention decides about: a page at a time, so that a look is bounded however much there is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
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
    looks = {"outputs": _outputs, "logs": _logs, "metadata": _metadata, "code": _code}
    for kind, look in looks.items():
        if policy.shortest(kind) is not None and (not cursors or kind in cursors):
            look(conn, policy, now, plan, most, (cursors or {}).get(kind, ""))
    return plan


def _old(policy: RetentionSettings, kind: str, now: datetime) -> sa.ColumnElement[bool]:
    """Executions that may be old enough; the project's own days are looked at afterwards."""
    return _E.ended_at < now - timedelta(days=policy.shortest(kind) or 0)


def _owner(row: Any) -> Owner:
    return Owner(
        id=row.owner_id, project=row.project, ended_at=row.ended_at, tags=row.owner_tags or ()
    )


def _pages(
    plan: Plan, kind: Kind, most: int, cursor: str, page: Callable[[str], Sequence[Any]]
) -> Any:
    """Rows of page after page, until enough is found; says in the plan where to go on."""
    for _ in range(MAX_PAGES):
        rows = page(cursor)
        yield rows
        if plan.counts[kind] >= most:
            cursor = plan.of(kind)[-1].id.partition("/")[0]
            break
        if len(rows) < PAGE:
            return
        cursor = rows[-1].cursor
    plan.cursors[kind] = cursor


# -- outputs ---------------------------------------------------------------------------------------------------------


def _outputs(
    conn: sa.Connection,
    policy: RetentionSettings,
    now: datetime,
    plan: Plan,
    most: int,
    cursor: str,
) -> None:
    d = t.datums.c
    query = _OUTPUTS.where(_old(policy, "outputs", now)).order_by(d.id).limit(PAGE)
    for rows in _pages(
        plan, "outputs", most, cursor, lambda at: conn.execute(query.where(d.id > at)).all()
    ):
        for row, why in _judged(conn, policy, now, rows):
            if why is not None:
                plan.kept[why] += 1
            elif plan.counts["outputs"] < most:
                plan.add(
                    Item(
                        kind="outputs",
                        id=row.cursor,
                        project=row.project,
                        bytes=row.size,
                        name=f"{row.name} of {row.step} #{row.counter}",
                        why=age_text(policy, "outputs", _owner(row), now),
                    )
                )


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


def _logs(
    conn: sa.Connection,
    policy: RetentionSettings,
    now: datetime,
    plan: Plan,
    most: int,
    cursor: str,
) -> None:
    a = t.attempts.c
    query = (
        sa.select(_E.id.label("cursor"), a.number, a.logs, *_OWNER)
        .join(t.attempts, a.execution_id == _E.id)
        .join(t.projects, _P.id == _E.project_id)
        .where(_old(policy, "logs", now), sa.cast(a.logs, sa.Text).like('%"key"%'))
        .order_by(_E.id, a.number)
        .limit(PAGE)
    )
    for rows in _pages(
        plan, "logs", most, cursor, lambda at: conn.execute(query.where(_E.id > at)).all()
    ):
        for row in rows:
            stored = {name: log for name, log in (row.logs or {}).items() if log.get("key")}
            ident = f"{row.cursor}/{row.number}"
            name = f"{row.step} #{row.counter}, attempt {row.number}"
            size = sum(int(log.get("size") or 0) for log in stored.values())
            _decide(policy, now, plan, "logs", most, _owner(row), ident, name, size)


def _metadata(
    conn: sa.Connection,
    policy: RetentionSettings,
    now: datetime,
    plan: Plan,
    most: int,
    cursor: str,
) -> None:
    m = t.metadata_events.c
    query = (
        sa.select(
            _E.id.label("cursor"),
            sa.func.count().label("lines"),
            sa.func.sum(sa.func.length(sa.cast(m["values"], sa.Text))).label("size"),
        )
        .join(t.executions, _E.id == m.execution_id)
        .where(_old(policy, "metadata", now))
        .group_by(_E.id)
        .order_by(_E.id)
        .limit(PAGE)
    )
    for rows in _pages(
        plan, "metadata", most, cursor, lambda at: conn.execute(query.where(_E.id > at)).all()
    ):
        owners = _owners(conn, [row.cursor for row in rows])
        for row in rows:
            owner, name = owners[row.cursor]
            text = f"{row.lines} lines of {name}"
            _decide(
                policy, now, plan, "metadata", most, owner, row.cursor, text, int(row.size or 0)
            )


def _owners(conn: sa.Connection, ids: Sequence[str]) -> dict[str, tuple[Owner, str]]:
    query = sa.select(*_OWNER).join(t.projects, _P.id == _E.project_id).where(_E.id.in_(ids))
    return {
        row.owner_id: (_owner(row), f"{row.step} #{row.counter}") for row in conn.execute(query)
    }


def _decide(
    policy: RetentionSettings,
    now: datetime,
    plan: Plan,
    kind: Kind,
    most: int,
    owner: Owner,
    ident: str,
    name: str,
    size: int,
) -> None:
    why = why_owner_keeps(policy, kind, owner, now)
    if why is not None:
        plan.kept[why] += 1
    elif plan.counts[kind] < most:
        text = age_text(policy, kind, owner, now)
        plan.add(Item(kind=kind, id=ident, project=owner.project, bytes=size, name=name, why=text))


# -- code ------------------------------------------------------------------------------------------------------------


def _code(
    conn: sa.Connection,
    policy: RetentionSettings,
    now: datetime,
    plan: Plan,
    most: int,
    cursor: str,
) -> None:
    """Archives that no execution has needed for long. The newest of a project is what its code location runs."""
    c = t.commits.c
    used = sa.and_(_E.project_id == c.project_id, _E.commit == c.identifier)
    newest = (
        sa.select(c.project_id, sa.func.max(c.ctime).label("ctime"))
        .group_by(c.project_id)
        .subquery()
    )
    query = (
        sa.select(
            c.id.label("cursor"),
            c.identifier,
            c.archive_size,
            c.ctime,
            _P.name.label("project"),
            sa.func.max(_E.ctime).label("last_use"),
            sa.func.count()
            .filter(sa.and_(_E.id.is_not(None), _E.ended_at.is_(None)))
            .label("open"),
            (newest.c.ctime == c.ctime).label("is_newest"),
        )
        .join(t.projects, _P.id == c.project_id)
        .join(newest, newest.c.project_id == c.project_id)
        .outerjoin(t.executions, used)
        .group_by(c.id, c.identifier, c.archive_size, c.ctime, _P.name, newest.c.ctime)
        .order_by(c.id)
        .limit(PAGE)
    )
    for rows in _pages(
        plan, "code", most, cursor, lambda at: conn.execute(query.where(c.id > at)).all()
    ):
        for row in rows:
            limit = cutoff(policy, "code", row.project, now)
            last = max(row.ctime, row.last_use) if row.last_use else row.ctime
            if limit is None or last >= limit or row.open or row.is_newest:
                reason = "the newest commit of its project" if row.is_newest else "needed lately"
                plan.kept[reason] += 1
            elif plan.counts["code"] < most:
                days = policy.days("code", row.project)
                plan.add(
                    Item(
                        kind="code",
                        id=row.cursor,
                        project=row.project,
                        bytes=row.archive_size or 0,
                        name=f"commit {row.identifier[:13]}",
                        why=f"last used {(now - last).days} days ago, archives are kept for {days:g}",
                    )
                )
