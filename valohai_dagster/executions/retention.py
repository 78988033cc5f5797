"""Carries out what retention has planned. Every step can be cut off and done again; records and lineage stay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from valohai_dagster.data import datums, own_uploads, packages
from valohai_dagster.data.package_removal import remove_packages
from valohai_dagster.errors import StoreError
from valohai_dagster.executions.retention_reading import (
    PAGE,
    archive_stays,
    make_plan,
    staying_outputs,
)
from valohai_dagster.executions.retention_rules import KINDS, Item, Kind, Plan
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records
from valohai_dagster.settings_retention import RetentionSettings
from valohai_dagster.stores.registry import Stores

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Done:
    """What was removed, by kind, and what could not be."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    problems: list[str] = field(default_factory=list)
    cursors: dict[str, str] = field(default_factory=dict)

    def add(self, kind: Kind, size: int, count: int = 1) -> None:
        self.counts[kind] += count
        self.bytes[kind] += size

    def to_dict(self) -> dict[str, Any]:
        kinds = {
            kind: {"count": self.counts[kind], "bytes": self.bytes[kind]}
            for kind in KINDS
            if self.counts[kind]
        }
        return {"kinds": kinds, "problems": self.problems, "more": bool(self.cursors)}


def plan_records(
    records: Records,
    policy: RetentionSettings,
    now: datetime,
    *,
    most: int | None = None,
    cursors: dict[str, str] | None = None,
) -> Plan:
    """What may go of the records' things: at most `most` of each kind, by default the settings' batch."""
    with records.read() as conn:
        return make_plan(conn, policy, now, most=most or policy.batch, cursors=cursors)


def carry_out(
    records: Records,
    stores: Stores,
    policy: RetentionSettings,
    plan: Plan,
    now: datetime,
    *,
    forget_live: Callable[[str, int], None] | None = None,
    done: Done | None = None,
) -> Done:
    """Removes what the plan names. A store that refuses is told, and costs only its own files.

    `forget_live` removes what is left of the live log of an attempt.
    """
    done = done or Done()
    done.cursors.update(plan.cursors)
    _outputs(records, stores, policy, plan.of("outputs"), now, done)
    for item in plan.of("logs"):
        _guarded(done, item, lambda item=item: _log(records, stores, item, now, forget_live))
    _metadata(records, plan.of("metadata"), done)
    for item in plan.of("code"):
        _guarded(done, item, lambda item=item: _archive(records, stores, policy, item, now))
    return done


def _guarded(done: Done, item: Item, remove: Callable[[], bool]) -> None:
    try:
        if remove():
            done.add(item.kind, item.bytes)
    except StoreError as error:
        text = f"{item.name} of project {item.project} could not be removed: {error}"
        log.warning("%s", text, extra={"action": "retention"})
        done.problems.append(text)


# -- outputs ---------------------------------------------------------------------------------------------------------


def _outputs(
    records: Records,
    stores: Stores,
    policy: RetentionSettings,
    items: Sequence[Item],
    now: datetime,
    done: Done,
) -> None:
    """Marked, deleted, and only then said to be done: what is cut off in between is taken up by the next plan.

    Everything is decided once more with the datums locked, so that nothing goes that got a name, a tag or a reader
    since the plan was made; a datum that somebody is just giving one is left to the next plan.
    """
    for start in range(0, len(items), PAGE):
        part = items[start : start + PAGE]
        with records.write() as conn:
            locked = datums.lock(conn, [item.id for item in part], skip=True)
            stays = staying_outputs(conn, policy, now, [row.id for row in locked])
            going = {row.id for row in locked} - stays
            datums.mark_purged(conn, sorted(going))
            removals = packages.drop_holding(conn, sorted(going), now)
        remove_packages(records, stores, removals)
        for item in part:
            if item.id in going:
                _guarded(done, item, lambda item=item: _content(records, stores, item, now))


def _content(records: Records, stores: Stores, item: Item, now: datetime) -> bool:
    d = t.datums.c
    with records.read() as conn:
        row = conn.execute(sa.select(d.store, d.key).where(d.id == item.id)).one()
        same = sa.and_(d.store == row.store, d.key == row.key, d.id != item.id)
        shared = conn.execute(sa.select(d.id).where(same, d.purged.is_(False)).limit(1)).first()
    if shared is None:
        stores[row.store].delete(row.key)
    with records.write() as conn:
        conn.execute(t.datums.update().where(d.id == item.id).values(purged_at=now))
    return True


# -- logs, metadata, code ----------------------------------------------------------------------------------------------


def _log(
    records: Records,
    stores: Stores,
    item: Item,
    now: datetime,
    forget_live: Callable[[str, int], None] | None,
) -> bool:
    """The files first: until the row says so, the next plan finds them again."""
    execution_id, _, number = item.id.rpartition("/")
    a = t.attempts.c
    mine = sa.and_(a.execution_id == execution_id, a.number == int(number))
    with records.read() as conn:
        logs: dict[str, Any] = conn.execute(sa.select(a.logs).where(mine)).scalar_one()
    for entry in logs.values():
        if entry.get("key"):
            stores[entry["store"]].delete(entry["key"])
    gone = {
        stream: {
            **{name: value for name, value in entry.items() if name not in ("key", "pieces")},
            "removed_at": entry.get("removed_at") or now.isoformat(timespec="seconds"),
        }
        for stream, entry in logs.items()
    }
    with records.write() as conn:
        conn.execute(t.attempts.update().where(mine).values(logs=gone))
    if forget_live is not None:
        forget_live(execution_id, int(number))
    return True


def _metadata(records: Records, items: Sequence[Item], done: Done) -> None:
    """The lines; `cumulative_metadata` of the execution keeps the last values (M-14)."""
    c = t.metadata_events.c
    for item in items:
        with records.write() as conn:
            conn.execute(t.metadata_events.delete().where(c.execution_id == item.id))
        done.add("metadata", item.bytes)


def _archive(
    records: Records, stores: Stores, policy: RetentionSettings, item: Item, now: datetime
) -> bool:
    """The row, with one more look at who uses it, then the archive: a commit that is launched again is published again.

    Between the two the archive is noted as one that goes. So whoever publishes the same commit meanwhile does not take
    it for his own (`archives.publish_archive`), and the sweep removes it if this process cannot.
    """
    c, p = t.commits.c, t.projects.c
    with records.write() as conn:
        row = conn.execute(sa.select(t.commits).where(c.id == item.id)).one_or_none()
        if row is None:
            return False
        conn.execute(sa.select(p.id).where(p.id == row.project_id).with_for_update())
        conn.execute(sa.select(c.id).where(c.id == row.id).with_for_update())
        if archive_stays(conn, policy, now, row.id):
            return False
        place = {"store": row.archive_store, "key": row.archive_key}
        same = sa.and_(c.archive_store == row.archive_store, c.archive_key == row.archive_key)
        others = sa.select(c.id).where(same, c.id != row.id).limit(1)
        conn.execute(t.commits.delete().where(c.id == row.id))
        if conn.execute(others).first() is not None:
            return True
        removal = own_uploads.note_removal(conn, kind="code", name=item.name, now=now, **place)
    stores[row.archive_store].delete(row.archive_key)
    with records.write() as conn:
        own_uploads.forget(conn, [removal])
    return True
