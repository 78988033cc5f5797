"""From what an execution's outputs ask for to versions of datasets and models (O-10 to O-13).

While the execution runs, its versions are only reserved. Their content is worked out once, when it ends, from the
outputs that it has then: so files of lost attempts do not count, metadata that was said again counts as said last,
and it does not matter how often a report was delivered or which conductor applied it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from valohai_dagster.data import datasets, models, packages
from valohai_dagster.data.datums import Datum
from valohai_dagster.data.version_wishes import (
    DatasetWish,
    ModelWish,
    Wishes,
    files_of_version,
    merge_dataset_wishes,
    merge_model_wishes,
    wishes_of,
)
from valohai_dagster.records import tables as t

Named = tuple[str, str]  # datum id and name


@dataclass(kw_only=True)
class Settled:
    """What became of the versions of an execution: lines for people."""

    made: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def reserve_versions(
    connection: sa.Connection,
    wishes: Wishes,
    *,
    project_id: str,
    execution_id: str,
    now: datetime,
) -> list[str]:
    """For one file; returns warnings. The caller's transaction also records the file."""
    warnings: list[str] = []
    owner = {"project_id": project_id, "execution_id": execution_id, "now": now}
    for wish in wishes.datasets:
        warnings += datasets.reserve_version(connection, wish, **owner)
    for wish in wishes.models:
        models.reserve_version(connection, wish, **owner)
    return warnings


def executions_with_versions(
    connection: sa.Connection, execution_ids: Collection[str]
) -> list[str]:
    """Those of them that have a version in the making."""
    v, m = t.dataset_versions.c, t.model_versions.c
    query = sa.union(
        sa.select(v.execution_id).where(
            v.execution_id.in_(execution_ids), v.state == datasets.OPEN
        ),
        sa.select(m.execution_id).where(
            m.execution_id.in_(execution_ids), m.status == models.CREATING
        ),
    )
    return list(connection.execute(query).scalars())


def settle_versions(connection: sa.Connection, execution_id: str, now: datetime) -> Settled:
    """Closes all versions of an execution that has ended, whatever its end.

    A version for which no file is left is given up, so that its name is free again.
    """
    v, m = t.dataset_versions.c, t.model_versions.c
    settled = Settled()
    by_dataset, by_model = _wanted(connection, execution_id, settled)
    for version in datasets.list_open(connection, execution_id):
        wishes = by_dataset.get((version.dataset, version.name))
        if not wishes:
            connection.execute(t.dataset_versions.delete().where(v.id == version.id))
            continue
        _close(connection, version, wishes, now, settled)
    for version in models.list_creating(connection, execution_id):
        found = by_model.get(version.slug)
        if not found:
            connection.execute(t.model_versions.delete().where(m.id == version.id))
            continue
        wish = merge_model_wishes(wish for wish, _ in found)
        ids = files_of_version([], [file for _, file in found], [])
        models.finish_version(connection, version, wish=wish, datum_ids=ids, now=now)
        settled.made.append(f"made {version.uri} of {_files(ids)}; it waits for approval")
    return settled


def _wanted(
    connection: sa.Connection, execution_id: str, settled: Settled
) -> tuple[
    dict[tuple[str, str], list[tuple[DatasetWish, Named]]], dict[str, list[tuple[ModelWish, Named]]]
]:
    """What the files that the execution has now ask for, in the order in which they were stored."""
    c = t.datums.c
    query = (
        sa.select(c.id, c.name, c.metadata, c.purged)
        .where(c.execution_id == execution_id, c.withdrawn.is_(False))
        .order_by(c.ctime, c.id)
    )
    of_datasets: dict[tuple[str, str], list[Any]] = defaultdict(list)
    of_models: dict[str, list[Any]] = defaultdict(list)
    for row in connection.execute(query):
        wishes = wishes_of(row.metadata or {})
        if row.purged:
            for uri in [wish.uri for wish in (*wishes.datasets, *wishes.models)]:
                settled.warnings.append(_left_out(uri, [row.name]))
            continue
        for wish in wishes.datasets:
            of_datasets[wish.dataset, wish.version].append((wish, (row.id, row.name)))
        for wish in wishes.models:
            of_models[wish.slug].append((wish, (row.id, row.name)))
    return of_datasets, of_models


def _close(
    connection: sa.Connection,
    version: datasets.DatasetVersion,
    wishes: Sequence[tuple[DatasetWish, Named]],
    now: datetime,
    settled: Settled,
) -> None:
    wish = merge_dataset_wishes(wish for wish, _ in wishes)
    base: Sequence[Datum] = ()
    if version.base_id and not wish.start_fresh:
        base = datasets.files_of(connection, version.base_id)
    own = [file for _, file in wishes]
    replaced = {*wish.exclude, *(name for _, name in own)}
    gone = [d.name for d in base if d.purged and d.name not in replaced]
    if gone:
        settled.warnings.append(_left_out(version.uri, gone))
    carried = [(d.id, d.name) for d in base if not d.purged]
    ids = files_of_version(carried, own, wish.exclude)
    settled.made.append(f"made {version.uri} of {_files(ids)}")
    settled.warnings += datasets.close_version(
        connection, version, wish=wish, datum_ids=ids, now=now
    )
    missing = sorted(set(wish.exclude) - {d.name for d in base})
    if missing:
        shown = ", ".join(map(repr, missing[:5]))
        settled.warnings.append(
            f"{version.uri}: no carried file has the name {shown}, which `exclude` has"
        )
    if wish.packaging or datasets.packs_versions(connection, version.dataset_id):
        packages.want(connection, version.id, now)
        advice = packages.advice([d.size for d in datasets.files_of(connection, version.id)])
        note = f"; {advice}" if advice else ""
        settled.made.append(f"{version.uri} will be packed in the background{note}")


def _left_out(uri: str, names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" * (len(names) > 5))
    return f"{uri}: {shown} cannot be in it, since the content was purged"


def _files(ids: Sequence[str]) -> str:
    return f"{len(ids)} file{'' if len(ids) == 1 else 's'}"
