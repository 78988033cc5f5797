"""What people mean by the name of files: ids, aliases, versions of datasets and models, names with wildcards."""

from __future__ import annotations

import sqlalchemy as sa

from valohai_dagster.data import aliases, datasets, models
from valohai_dagster.data.datums import SCHEME, Datum, find_datum, get_datum, list_datums
from valohai_dagster.data.survey import MAX_FILES
from valohai_dagster.data.version_wishes import DATASET_SCHEME, MODEL_SCHEME
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.records import tables as t

SHORTEST_PREFIX = 8  # characters of a datum id that are enough
SHOWN = 5  # files in a message


def names_one(reference: str) -> bool:
    """Whether it means one datum by its form, and not as many as there happen to be."""
    return "*" not in reference and not reference.startswith((DATASET_SCHEME, MODEL_SCHEME))


def find_datums(
    connection: sa.Connection, reference: str, *, project_id: str | None
) -> list[Datum]:
    """The datums of `datum://ID`, an id, an alias, a name, `dataset://...`, `model://...`, or a name with `*`.

    A name with `*` selects the newest datum of each name, purged ones left out. Raises `NotFoundError` naming what is
    unknown, and `RefusedError` for a plain name that several files have.
    """
    if reference.startswith(DATASET_SCHEME):
        version = datasets.get_version(connection, reference, project_id=project_id)
        return datasets.files_of(connection, version.id)
    if reference.startswith(MODEL_SCHEME):
        model = models.get_version(connection, reference, project_id=project_id)
        return models.files_of(connection, model.id)
    if "*" not in reference:
        return [_find_one(connection, reference, project_id)]
    found = list_datums(connection, project_id=project_id, name=reference, limit=MAX_FILES)
    newest = {datum.name: datum for datum in reversed(found)}
    if not newest:
        raise NotFoundError(
            f"no datum has a name like {reference!r}; `valohai-dagster data ls` lists them"
        )
    return [newest[name] for name in sorted(newest)]


def _find_one(connection: sa.Connection, reference: str, project_id: str | None) -> Datum:
    """An alias comes before a file's name, as where executions read it."""
    name = reference.removeprefix(SCHEME)
    if aliases.is_datum_id(name) or _is_alias(connection, name, project_id):
        return get_datum(connection, reference, project_id=project_id)
    found = _by_prefix(connection, name) or _by_name(connection, name, project_id)
    if not found:
        where = "no project has a" if project_id is None else "this project has no"
        raise NotFoundError(
            f"{reference}: {where} datum of this id, alias or name; `valohai-dagster data ls` lists them, and "
            "in names * stands for anything"
        )
    if len(found) > 1:
        raise RefusedError(_which(reference, found))
    return found[0]


def _is_alias(connection: sa.Connection, name: str, project_id: str | None) -> bool:
    c = t.datum_aliases.c
    query = sa.select(c.name).where(c.name == name).limit(1)
    if project_id is not None:
        query = query.where(c.project_id == project_id)
    return connection.execute(query).first() is not None


def _by_prefix(connection: sa.Connection, name: str) -> list[Datum]:
    low = name.lower()
    if len(low) < SHORTEST_PREFIX or not set(low) <= set("0123456789abcdef-"):
        return []
    c = t.datums.c
    query = sa.select(c.id).where(c.id.startswith(low, autoescape=True)).limit(SHOWN + 1)
    return _loaded(connection, query)


def _by_name(connection: sa.Connection, name: str, project_id: str | None) -> list[Datum]:
    """Purged files only where no other has the name."""
    c = t.datums.c
    query = sa.select(c.id).where(c.name == name, c.withdrawn.is_(False))
    if project_id is not None:
        query = query.where(c.project_id == project_id)
    query = query.order_by(c.ctime.desc(), c.id).limit(SHOWN + 1)
    there = _loaded(connection, query.where(c.purged.is_(False)))
    return there or _loaded(connection, query)


def _loaded(connection: sa.Connection, ids: sa.Select[tuple[str]]) -> list[Datum]:
    found = [find_datum(connection, one) for one in connection.execute(ids).scalars().all()]
    return [datum for datum in found if datum is not None]


def _which(reference: str, found: list[Datum]) -> str:
    lines = [f"  {one.uri}  {one.name}  {one.ctime:%Y-%m-%d %H:%M:%S}" for one in found[:SHOWN]]
    lines += ["  and more"] * (len(found) > SHOWN)
    return "\n".join(
        [f"several files fit {reference!r}; say which one by its id, newest first:", *lines]
    )
