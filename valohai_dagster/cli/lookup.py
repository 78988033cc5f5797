"""Finds the executions that a person means: by run, execution id, `project#number`, or `latest`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import sqlalchemy as sa

from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.records import tables as t

SHORTEST_PREFIX = 4  # characters of an id that are enough, as long as they are unambiguous
_COUNTER = re.compile(r"^(?:(?P<project>.+))?#(?P<number>\d+)$")
REFERENCE_HELP = "A Dagster run id, an execution id (the first characters are enough), PROJECT#NUMBER, or `latest`."


def find_executions(conn: sa.Connection, reference: str, *, step: str | None = None) -> list[str]:
    """Execution ids in the order of their creation, at least one.

    Raises NotFoundError naming what was looked for, and RefusedError when a short id fits several runs.
    """
    found = _matching(conn, reference.strip())
    if step is not None:
        steps = sorted({name for _, name in found})
        found = [(execution, name) for execution, name in found if name == step]
        if steps and not found:
            raise NotFoundError(f"{reference} has no step {step!r}; it has {', '.join(steps)}")
    if not found:
        raise NotFoundError(
            f"no execution fits {reference!r}. {REFERENCE_HELP} Run ids are in the UI under Runs; this command "
            "looks in the records of the deployment that `valohai-dagster doctor` shows"
        )
    return [execution for execution, _ in found]


def find_run(conn: sa.Connection, reference: str) -> str | None:
    """The Dagster run that the reference names, None when it names an execution or nothing that the records know.

    Raises RefusedError when a short id fits several runs.
    """
    reference = reference.strip()
    if reference == "latest":
        return _latest_run(conn)
    wanted = _id_prefix(reference)
    if wanted is None or _select(conn, t.executions.c.id.startswith(wanted, autoescape=True)):
        return None
    for column in (t.executions.c.run_id, t.runs.c.run_id):
        _refuse_ambiguous(conn, column, wanted)
        query = sa.select(column).where(column.startswith(wanted, autoescape=True)).limit(1)
        if (found := conn.execute(query).scalar()) is not None:
            return found
    return None


def _latest_run(conn: sa.Connection) -> str | None:
    """Of what was submitted or handed over last."""
    newest = [
        conn.execute(
            sa.select(table.c.ctime, table.c.run_id).order_by(table.c.ctime.desc()).limit(1)
        ).one_or_none()
        for table in (t.executions, t.runs)
    ]
    return max((row for row in newest if row is not None), default=(None, None))[1]


def _id_prefix(reference: str) -> str | None:
    wanted = reference.removeprefix("exec-").lower()
    fits = len(wanted) >= SHORTEST_PREFIX and re.fullmatch(r"[0-9a-f-]+", wanted)
    return wanted if fits else None


def _matching(conn: sa.Connection, reference: str) -> list[tuple[str, str]]:
    e = t.executions.c
    if reference == "latest":
        return _of_latest(conn)
    counter = _COUNTER.match(reference)
    if counter:
        return _select(conn, _by_counter(counter["project"], int(counter["number"])))
    wanted = _id_prefix(reference)
    if wanted is None:
        return []
    for column in (e.id, e.run_id):
        _refuse_ambiguous(conn, column, wanted)
        if found := _select(conn, column.startswith(wanted, autoescape=True)):
            return found
    return []


def _of_latest(conn: sa.Connection) -> list[tuple[str, str]]:
    """All executions of the run that started one last."""
    e = t.executions.c
    newest = conn.execute(sa.select(e.id, e.run_id).order_by(e.ctime.desc()).limit(1)).one_or_none()
    if newest is None:
        return []
    return _select(conn, e.run_id == newest.run_id if newest.run_id else e.id == newest.id)


def _by_counter(project: str | None, number: int) -> sa.ColumnElement[bool]:
    where = t.executions.c.counter == number
    return where & (t.projects.c.name == project) if project else where


def _refuse_ambiguous(conn: sa.Connection, column: sa.Column[str], prefix: str) -> None:
    query = sa.select(column).where(column.startswith(prefix, autoescape=True)).distinct().limit(4)
    ids: Sequence[str] = conn.execute(query).scalars().all()
    if len(ids) > 1 and prefix not in ids:
        raise RefusedError(f"{prefix} fits several: {', '.join(ids[:3])}; write more of the id")


def _select(conn: sa.Connection, where: sa.ColumnElement[bool]) -> list[tuple[str, str]]:
    query = (
        sa.select(t.executions.c.id, t.executions.c.step)
        .join(t.projects, t.projects.c.id == t.executions.c.project_id)
        .where(where)
        .order_by(t.executions.c.ctime, t.executions.c.counter)
    )
    return [(row.id, row.step) for row in conn.execute(query)]
