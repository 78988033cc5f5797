"""Datasets: named containers whose versions are immutable sets of datums (T-16). Statements over a connection.

A version is open while the execution that makes it runs, and closed for good when that ends; versions that people
make are closed at once. Only closed versions can be read.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from valohai_dagster.data import aliases, packages, version_files
from valohai_dagster.data.datums import Datum, hold
from valohai_dagster.data.projects_known import project_missing
from valohai_dagster.data.version_wishes import (
    DATASET_SCHEME,
    LATEST,
    DatasetWish,
    check_name,
    check_version_name,
    split_dataset_uri,
)
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.records import tables as t
from valohai_dagster.records.store import insert_ignore

OPEN, CLOSED = "open", "closed"
_D, _V, _F, _A = t.datasets.c, t.dataset_versions.c, t.dataset_files.c, t.dataset_aliases.c
CHUNK = 500  # rows of one statement with a list of ids


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """`packaging`: new versions are packed (O-23)."""

    id: str
    project_id: str
    name: str
    ctime: datetime
    properties: dict[str, Any] = field(default_factory=dict)
    packaging: bool = False


@dataclass(frozen=True, kw_only=True)
class DatasetVersion:
    """`wish`: what was asked of it (`exclude`, `aliases`), for the record."""

    id: str
    dataset_id: str
    dataset: str
    name: str
    state: str
    ctime: datetime
    execution_id: str | None = None
    base_id: str | None = None
    wish: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    properties: dict[str, Any] = field(default_factory=dict)
    closed_at: datetime | None = None

    @property
    def uri(self) -> str:
        return f"{DATASET_SCHEME}{self.dataset}/{self.name}"


# -- looking up --------------------------------------------------------------------------------------------------


def find_dataset(connection: sa.Connection, project_id: str, name: str) -> Dataset | None:
    query = sa.select(t.datasets).where(_D.project_id == project_id, _D.name == name)
    row = connection.execute(query).mappings().one_or_none()
    return Dataset(**row) if row else None


def get_dataset(connection: sa.Connection, project_id: str, name: str) -> Dataset:
    found = find_dataset(connection, project_id, name)
    if found is not None:
        return found
    known = [dataset.name for dataset in list_datasets(connection, project_id)]
    raise NotFoundError(
        f"{DATASET_SCHEME}{name}: this project has no dataset {name!r}; known are {_some(known)}. An output makes one "
        "by `valohai.dataset-versions` in its metadata, a person by `valohai-dagster data datasets create`"
    )


def get_version(
    connection: sa.Connection, reference: str, *, project_id: str | None
) -> DatasetVersion:
    """The closed version of `dataset://<dataset>/<version or alias>`; `latest` is the alias of that name, else the
    newest version.

    Raises `NotFoundError` naming what is unknown, `RefusedError` for a version that is not closed yet.
    """
    name, wanted = split_dataset_uri(reference)
    if project_id is None:
        why = "a dataset belongs to a project"
        raise project_missing(connection, reference, why, t.datasets.c.name, name)
    dataset = get_dataset(connection, project_id, name)
    found = find_version(connection, dataset, wanted) if wanted else None
    if found is None:
        known = [v.name for v in list_versions(connection, dataset.id) if v.state == CLOSED]
        names = [*known, *sorted(aliases_of_dataset(connection, dataset.id))]
        raise NotFoundError(
            f"{reference}: dataset {name!r} has no version or alias {wanted!r}; known are {_some(names)}"
        )
    if found.state != CLOSED:
        raise RefusedError(
            f"{reference}: execution {found.execution_id} is still making this version; it can be read when that ends"
        )
    return found


def find_version(connection: sa.Connection, dataset: Dataset, wanted: str) -> DatasetVersion | None:
    """By version name, else by alias, else the newest closed one for `latest`."""
    mine = _V.dataset_id == dataset.id
    found = _one_version(connection, mine, _V.name == wanted)
    if found is None:
        alias = sa.select(_A.version_id).where(_A.dataset_id == dataset.id, _A.name == wanted)
        found = _one_version(connection, mine, _V.id == alias.scalar_subquery())
    if found is None and wanted == LATEST:
        found = _one_version(connection, mine, _V.state == CLOSED)
    return found


def version_by_id(connection: sa.Connection, version_id: str) -> DatasetVersion | None:
    return _one_version(connection, _V.id == version_id)


def _one_version(
    connection: sa.Connection, *where: sa.ColumnElement[bool]
) -> DatasetVersion | None:
    return next(iter(_versions(connection, *where, limit=1)), None)


def _versions(
    connection: sa.Connection, *where: sa.ColumnElement[bool], limit: int | None = None
) -> list[DatasetVersion]:
    """Newest first."""
    query = (
        sa.select(t.dataset_versions, _D.name.label("dataset"))
        .join(t.datasets, _D.id == _V.dataset_id)
        .where(*where)
        .order_by(sa.func.coalesce(_V.closed_at, _V.ctime).desc(), _V.name.desc())
        .limit(limit)
    )
    return [DatasetVersion(**row) for row in connection.execute(query).mappings()]


def list_datasets(connection: sa.Connection, project_id: str | None = None) -> list[Dataset]:
    """By name; of all projects without one."""
    query = sa.select(t.datasets).order_by(_D.name, _D.id)
    if project_id is not None:
        query = query.where(_D.project_id == project_id)
    return [Dataset(**row) for row in connection.execute(query).mappings()]


def list_versions(connection: sa.Connection, dataset_id: str) -> list[DatasetVersion]:
    """Newest first, open ones among them."""
    return _versions(connection, _V.dataset_id == dataset_id)


def list_open(connection: sa.Connection, execution_id: str) -> list[DatasetVersion]:
    """Versions that the execution is making."""
    return _versions(connection, _V.execution_id == execution_id, _V.state == OPEN)


def files_of(connection: sa.Connection, version_id: str) -> list[Datum]:
    """Datums of a version by name, purged ones too."""
    return version_files.read(connection, t.dataset_files, version_id)


def versions_holding(
    connection: sa.Connection, datum_ids: Sequence[str]
) -> dict[str, list[DatasetVersion]]:
    """By datum the dataset versions that it is in."""
    found: dict[str, list[DatasetVersion]] = {}
    for start in range(0, len(datum_ids), CHUNK):
        query = (
            sa.select(t.dataset_versions, _D.name.label("dataset"), _F.datum_id)
            .join(t.datasets, _D.id == _V.dataset_id)
            .join(t.dataset_files, _F.version_id == _V.id)
            .where(_F.datum_id.in_(datum_ids[start : start + CHUNK]))
            .order_by(_D.name, _V.name)
        )
        for row in connection.execute(query).mappings():
            values = dict(row)
            found.setdefault(values.pop("datum_id"), []).append(DatasetVersion(**values))
    return found


# -- making ------------------------------------------------------------------------------------------------------


def ensure_dataset(
    connection: sa.Connection, *, project_id: str, name: str, now: datetime
) -> Dataset:
    """The dataset, made when it is new (O-12)."""
    check_name(name, "dataset name")
    found = find_dataset(connection, project_id, name)
    if found is None:
        values = {"id": str(uuid.uuid4()), "project_id": project_id, "name": name, "ctime": now}
        insert_ignore(connection, t.datasets, properties={}, **values)
        found = find_dataset(connection, project_id, name)
    assert found is not None
    return found


def reserve_version(
    connection: sa.Connection,
    wish: DatasetWish,
    *,
    project_id: str,
    execution_id: str,
    now: datetime,
) -> list[str]:
    """The version becomes this execution's to make, if it is nobody's yet; warnings otherwise (O-11).

    Doing it again changes nothing, so every file may ask.
    """
    dataset = ensure_dataset(connection, project_id=project_id, name=wish.dataset, now=now)
    if wish.version in aliases_of_dataset(connection, dataset.id):
        return [
            f"{wish.uri}: {wish.version!r} is an alias of dataset {wish.dataset!r}; no version was made"
        ]
    base, warnings = _base_of(connection, wish, project_id)
    made = insert_ignore(
        connection,
        t.dataset_versions,
        id=str(uuid.uuid4()),
        dataset_id=dataset.id,
        name=wish.version,
        state=OPEN,
        execution_id=execution_id,
        base_id=base,
        wish={},
        tags=[],
        properties={},
        ctime=now,
    )
    if made:
        return warnings
    version = _one_version(connection, _V.dataset_id == dataset.id, _V.name == wish.version)
    assert version is not None
    if version.execution_id == execution_id and version.state == OPEN:
        return [*warnings, *_other_base(connection, version, base)]
    return [_taken(version)]


def _base_of(
    connection: sa.Connection, wish: DatasetWish, project_id: str
) -> tuple[str | None, list[str]]:
    """`from`: a whole URI, or a version or alias of the same dataset."""
    if wish.carries_over is None:
        return None, []
    base = wish.carries_over
    uri = base if base.startswith(DATASET_SCHEME) else f"{DATASET_SCHEME}{wish.dataset}/{base}"
    try:
        return get_version(connection, uri, project_id=project_id).id, []
    except RefusedError as error:
        return None, [f"{wish.uri}: nothing is carried over, since `from` is wrong: {error}"]


def _other_base(connection: sa.Connection, version: DatasetVersion, base: str | None) -> list[str]:
    if base is None or base == version.base_id:
        return []
    if version.base_id is not None:
        return [f"{version.uri}: its files name different versions in `from`; the first one counts"]
    connection.execute(t.dataset_versions.update().where(_V.id == version.id).values(base_id=base))
    return []


def _taken(version: DatasetVersion) -> str:
    by = f" by execution {version.execution_id}" if version.execution_id else ""
    what = "is being made" if version.state == OPEN else "was made"
    return (
        f"{version.uri} {what}{by} and takes nothing from others; the files are stored, but not added to it. "
        "Choose another version name"
    )


def close_version(
    connection: sa.Connection,
    version: DatasetVersion,
    *,
    wish: DatasetWish,
    datum_ids: Sequence[str],
    now: datetime,
) -> list[str]:
    """Fixes the content for good and moves the aliases that it is meant for; returns warnings."""
    version_files.write(connection, t.dataset_files, version.id, datum_ids)
    connection.execute(
        t.dataset_versions.update()
        .where(_V.id == version.id)
        .values(
            state=CLOSED,
            closed_at=now,
            tags=list(wish.tags),
            wish={"exclude": list(wish.exclude), "aliases": list(wish.aliases)},
        )
    )
    warnings = []
    for alias in wish.aliases:
        try:
            point_alias(connection, version, name=alias, now=now)
        except RefusedError as error:
            warnings.append(f"{version.uri}: {error}; the alias was not moved")
    return warnings


def create_version(
    connection: sa.Connection,
    *,
    project_id: str,
    uri: str,
    datum_ids: Sequence[str],
    now: datetime,
    tags: Sequence[str] = (),
    properties: Mapping[str, Any] | None = None,
) -> DatasetVersion:
    """A version that a person makes, closed at once. Raises `RefusedError` when it exists, or a file was purged."""
    name, version = split_dataset_uri(uri)
    check_version_name(version)
    dataset = ensure_dataset(connection, project_id=project_id, name=name, now=now)
    if version in aliases_of_dataset(connection, dataset.id):
        raise RefusedError(f"{uri}: {version!r} is an alias; choose another version name")
    values = {"id": str(uuid.uuid4()), "dataset_id": dataset.id, "name": version, "ctime": now}
    made = insert_ignore(
        connection,
        t.dataset_versions,
        **values,
        state=CLOSED,
        closed_at=now,
        wish={},
        tags=list(tags),
        properties=dict(properties or {}),
    )
    if not made:
        raise RefusedError(f"{uri} exists already, and versions never change; choose another name")
    hold(connection, datum_ids)
    version_files.write(connection, t.dataset_files, values["id"], datum_ids)
    if dataset.packaging:
        packages.want(connection, values["id"], now)
    found = version_by_id(connection, values["id"])
    assert found is not None
    return found


def set_packaging(connection: sa.Connection, dataset_id: str, packaging: bool) -> None:
    """Whether versions that are made from now on are packed."""
    switch = t.datasets.update().where(_D.id == dataset_id)
    connection.execute(switch.values(packaging=packaging))


def packs_versions(connection: sa.Connection, dataset_id: str) -> bool:
    query = sa.select(_D.packaging).where(_D.id == dataset_id)
    return bool(connection.execute(query).scalar())


def set_properties(
    connection: sa.Connection, target: Dataset | DatasetVersion, properties: Mapping[str, Any]
) -> None:
    """Adds to or replaces single properties; None removes one (O-24)."""
    table = t.datasets if isinstance(target, Dataset) else t.dataset_versions
    merged = {k: v for k, v in {**target.properties, **properties}.items() if v is not None}
    connection.execute(table.update().where(table.c.id == target.id).values(properties=merged))


# -- aliases -----------------------------------------------------------------------------------------------------


def aliases_of_dataset(connection: sa.Connection, dataset_id: str) -> dict[str, str]:
    """Version ids by alias."""
    query = sa.select(_A.name, _A.version_id).where(_A.dataset_id == dataset_id).order_by(_A.name)
    return {row.name: row.version_id for row in connection.execute(query)}


def point_alias(
    connection: sa.Connection, version: DatasetVersion, *, name: str, now: datetime
) -> None:
    """Creates or moves an alias; every version it ever pointed to stays in its history, oldest first."""
    check_name(name, "dataset alias")
    same = sa.select(_V.id).where(_V.dataset_id == version.dataset_id, _V.name == name)
    if connection.execute(same).first() is not None:
        raise RefusedError(
            f"{name!r} is no alias for dataset {version.dataset!r}: a version has that name"
        )
    keys = {"dataset_id": version.dataset_id, "name": name}
    aliases.point(connection, t.dataset_aliases, keys, "version_id", version.id, now)


def remove_alias(connection: sa.Connection, dataset_id: str, name: str) -> bool:
    """Tells whether it was there."""
    mine = sa.and_(_A.dataset_id == dataset_id, _A.name == name)
    return connection.execute(t.dataset_aliases.delete().where(mine)).rowcount > 0


def alias_history(connection: sa.Connection, dataset_id: str, name: str) -> list[dict[str, Any]]:
    """`{version_id, time}` of every move, oldest first; empty for an unknown alias."""
    query = sa.select(_A.history).where(_A.dataset_id == dataset_id, _A.name == name)
    return list(connection.execute(query).scalar_one_or_none() or [])


def _some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "") if names else "none"
