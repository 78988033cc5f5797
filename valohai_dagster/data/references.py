"""What people mean by the name of files: ids, aliases, versions of datasets and models, names with wildcards."""

from __future__ import annotations

import sqlalchemy as sa

from valohai_dagster.data import datasets, models
from valohai_dagster.data.datums import Datum, get_datum, list_datums
from valohai_dagster.data.survey import MAX_FILES
from valohai_dagster.data.version_wishes import DATASET_SCHEME, MODEL_SCHEME
from valohai_dagster.errors import NotFoundError


def names_one(reference: str) -> bool:
    """Whether it means one datum by its form, and not as many as there happen to be."""
    return "*" not in reference and not reference.startswith((DATASET_SCHEME, MODEL_SCHEME))


def find_datums(
    connection: sa.Connection, reference: str, *, project_id: str | None
) -> list[Datum]:
    """The datums of `datum://ID`, an id, an alias, `dataset://...`, `model://...`, or a name with `*`.

    A name selects the newest datum of each name, purged ones left out. Raises `NotFoundError` naming what is unknown.
    """
    if reference.startswith(DATASET_SCHEME):
        version = datasets.get_version(connection, reference, project_id=project_id)
        return datasets.files_of(connection, version.id)
    if reference.startswith(MODEL_SCHEME):
        model = models.get_version(connection, reference, project_id=project_id)
        return models.files_of(connection, model.id)
    if "*" not in reference:
        return [get_datum(connection, reference, project_id=project_id)]
    found = list_datums(connection, project_id=project_id, name=reference, limit=MAX_FILES)
    newest = {datum.name: datum for datum in reversed(found)}
    if not newest:
        raise NotFoundError(
            f"no datum has a name like {reference!r}; `valohai-dagster data ls` lists them"
        )
    return [newest[name] for name in sorted(newest)]
