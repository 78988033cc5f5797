"""Models: numbered versions of sets of files that people approve or reject (T-17). Statements over a connection.

A version is `creating` while the execution that makes it runs, then `pending` until somebody decides; a decision may
be taken back. Its files never change.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from valohai_dagster.data import version_files
from valohai_dagster.data.datums import Datum
from valohai_dagster.data.projects_known import project_missing
from valohai_dagster.data.version_wishes import (
    LATEST,
    MODEL_SCHEME,
    ModelWish,
    check_name,
    split_model_uri,
)
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.records import tables as t
from valohai_dagster.records.store import insert_ignore

CREATING, PENDING, APPROVED, REJECTED = "creating", "pending", "approved", "rejected"
_M, _V, _F = t.models.c, t.model_versions.c, t.model_files.c


@dataclass(frozen=True, kw_only=True)
class Model:
    id: str
    project_id: str
    slug: str
    counter: int
    ctime: datetime


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """`history`: `{status, time}` of every change, oldest first."""

    id: str
    model_id: str
    slug: str
    number: int
    status: str
    ctime: datetime
    execution_id: str | None = None
    tags: list[str] = field(default_factory=list)
    release_note: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"{MODEL_SCHEME}{self.slug}/{self.number}"


# -- looking up --------------------------------------------------------------------------------------------------


def find_model(connection: sa.Connection, project_id: str, slug: str) -> Model | None:
    query = sa.select(t.models).where(_M.project_id == project_id, _M.slug == slug)
    row = connection.execute(query).mappings().one_or_none()
    return Model(**row) if row else None


def get_model(connection: sa.Connection, project_id: str, slug: str) -> Model:
    found = find_model(connection, project_id, slug)
    if found is not None:
        return found
    known = ", ".join(model.slug for model in list_models(connection, project_id)[:10]) or "none"
    raise NotFoundError(
        f"{MODEL_SCHEME}{slug}: this project has no model {slug!r}; known are {known}. An output makes one by "
        "`valohai.model-versions` in its metadata, a person by `valohai-dagster data models create`"
    )


def get_version(
    connection: sa.Connection, reference: str, *, project_id: str | None
) -> ModelVersion:
    """The version of `model://<slug>/<number>`; `latest` is the newest approved one (I-08).

    Raises `NotFoundError` naming what is unknown, `RefusedError` for a version that is still being made.
    """
    slug, wanted = split_model_uri(reference)
    if project_id is None:
        why = "a model belongs to a project"
        raise project_missing(connection, reference, why, t.models.c.slug, slug)
    model = get_model(connection, project_id, slug)
    versions = list_versions(connection, model.id)
    if wanted == LATEST:
        found = next((v for v in versions if v.status == APPROVED), None)
        if found is None:
            raise NotFoundError(
                f"{reference}: no version of model {slug!r} is approved; approve one with "
                f"`valohai-dagster data models approve {MODEL_SCHEME}{slug}/NUMBER`, or name the number"
            )
        return found
    found = next((v for v in versions if str(v.number) == wanted), None)
    if found is None:
        known = ", ".join(str(v.number) for v in versions[:10]) or "none"
        raise NotFoundError(
            f"{reference}: model {slug!r} has no version {wanted!r}; known are {known}, and {LATEST} for the newest "
            "approved one"
        )
    if found.status == CREATING:
        raise RefusedError(
            f"{reference}: execution {found.execution_id} is still making this version; it can be read when that ends"
        )
    return found


def list_models(connection: sa.Connection, project_id: str | None = None) -> list[Model]:
    """By slug; of all projects without one."""
    query = sa.select(t.models).order_by(_M.slug, _M.id)
    if project_id is not None:
        query = query.where(_M.project_id == project_id)
    return [Model(**row) for row in connection.execute(query).mappings()]


def list_versions(connection: sa.Connection, model_id: str) -> list[ModelVersion]:
    """Newest first, those in the making among them."""
    return _versions(connection, _V.model_id == model_id)


def list_creating(connection: sa.Connection, execution_id: str) -> list[ModelVersion]:
    """Versions that the execution is making."""
    return _versions(connection, _V.execution_id == execution_id, _V.status == CREATING)


def _versions(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> list[ModelVersion]:
    query = (
        sa.select(t.model_versions, _M.slug)
        .join(t.models, _M.id == _V.model_id)
        .where(*where)
        .order_by(_V.number.desc())
    )
    return [ModelVersion(**row) for row in connection.execute(query).mappings()]


def files_of(connection: sa.Connection, version_id: str) -> list[Datum]:
    """Datums of a version by name, purged ones too."""
    return version_files.read(connection, t.model_files, version_id)


def versions_holding(
    connection: sa.Connection, datum_ids: Sequence[str], *, chunk: int = 500
) -> dict[str, list[ModelVersion]]:
    """By datum the model versions that it is in."""
    found: dict[str, list[ModelVersion]] = {}
    for start in range(0, len(datum_ids), chunk):
        query = (
            sa.select(t.model_versions, _M.slug, _F.datum_id)
            .join(t.models, _M.id == _V.model_id)
            .join(t.model_files, _F.version_id == _V.id)
            .where(_F.datum_id.in_(datum_ids[start : start + chunk]))
            .order_by(_M.slug, _V.number)
        )
        for row in connection.execute(query).mappings():
            values = dict(row)
            found.setdefault(values.pop("datum_id"), []).append(ModelVersion(**values))
    return found


# -- making ------------------------------------------------------------------------------------------------------


def ensure_model(connection: sa.Connection, *, project_id: str, slug: str, now: datetime) -> Model:
    """The model, made when it is new."""
    check_name(slug, "model slug")
    found = find_model(connection, project_id, slug)
    if found is None:
        values = {"id": str(uuid.uuid4()), "project_id": project_id, "slug": slug, "ctime": now}
        insert_ignore(connection, t.models, counter=0, **values)
        found = find_model(connection, project_id, slug)
    assert found is not None
    return found


def reserve_version(
    connection: sa.Connection,
    wish: ModelWish,
    *,
    project_id: str,
    execution_id: str,
    now: datetime,
) -> None:
    """One new version of this model for this execution, however many files ask (O-13)."""
    model = ensure_model(connection, project_id=project_id, slug=wish.slug, now=now)
    mine = sa.select(_V.id).where(_V.model_id == model.id, _V.execution_id == execution_id)
    if connection.execute(mine).first() is None:
        _insert_version(connection, model, execution_id, CREATING, now)


def _insert_version(
    connection: sa.Connection, model: Model, execution_id: str | None, status: str, now: datetime
) -> str:
    """The next number; the model's row is locked until the transaction ends."""
    counter = (t.models.update().where(_M.id == model.id).values(counter=_M.counter + 1)).returning(
        _M.counter
    )
    number = connection.execute(counter).scalar_one()
    version_id = str(uuid.uuid4())
    connection.execute(
        t.model_versions.insert().values(
            id=version_id,
            model_id=model.id,
            number=number,
            status=status,
            execution_id=execution_id,
            tags=[],
            history=[_change(status, now)],
            ctime=now,
        )
    )
    return version_id


def finish_version(
    connection: sa.Connection,
    version: ModelVersion,
    *,
    wish: ModelWish,
    datum_ids: Sequence[str],
    now: datetime,
) -> None:
    """Fixes the content for good: `creating` becomes `pending`."""
    version_files.write(connection, t.model_files, version.id, datum_ids)
    connection.execute(
        t.model_versions.update()
        .where(_V.id == version.id)
        .values(
            status=PENDING,
            tags=list(wish.tags),
            release_note=wish.release_note,
            history=[*version.history, _change(PENDING, now)],
        )
    )


def create_version(
    connection: sa.Connection,
    wish: ModelWish,
    *,
    project_id: str,
    datum_ids: Sequence[str],
    now: datetime,
) -> ModelVersion:
    """The next version, made by a person: `pending` at once."""
    model = ensure_model(connection, project_id=project_id, slug=wish.slug, now=now)
    version_id = _insert_version(connection, model, None, PENDING, now)
    version_files.write(connection, t.model_files, version_id, datum_ids)
    values = {"tags": list(wish.tags), "release_note": wish.release_note}
    connection.execute(t.model_versions.update().where(_V.id == version_id).values(**values))
    return _versions(connection, _V.id == version_id)[0]


# -- deciding ----------------------------------------------------------------------------------------------------


def decide(
    connection: sa.Connection, version: ModelVersion, *, approved: bool, now: datetime
) -> None:
    """Approves or rejects; deciding the same again changes nothing."""
    status = APPROVED if approved else REJECTED
    if version.status == status:
        return
    history = [*version.history, _change(status, now)]
    connection.execute(
        t.model_versions.update().where(_V.id == version.id).values(status=status, history=history)
    )


def describe(
    connection: sa.Connection,
    version: ModelVersion,
    *,
    release_note: str | None = None,
    tags: Sequence[str] | None = None,
) -> None:
    """Replaces the release note, the tags, or both."""
    values: dict[str, Any] = {} if release_note is None else {"release_note": release_note or None}
    if tags is not None:
        values["tags"] = list(dict.fromkeys(tags))
    if values:
        connection.execute(t.model_versions.update().where(_V.id == version.id).values(**values))


def _change(status: str, now: datetime) -> dict[str, Any]:
    return {"status": status, "time": now.isoformat()}
