"""`valohai-dagster data models`: numbered versions of models, and whether they are approved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import sqlalchemy as sa
import typer

from valohai_dagster.cli.data_place import (
    AsJson,
    OfProject,
    Project,
    datum_dict,
    deployment,
    find_all,
    now,
    print_datums,
    print_json,
    print_rows,
    print_table,
)
from valohai_dagster.cli.render import cell_text, counted
from valohai_dagster.data import models
from valohai_dagster.data.version_wishes import MODEL_SCHEME, ModelWish, split_model_uri

app = typer.Typer(no_args_is_help=True, help="Models: numbered versions that people approve.")

Version = Annotated[
    str, typer.Argument(help="SLUG/NUMBER or SLUG/latest, with or without model://.")
]


@app.command("ls")
def list_(project: OfProject = None, as_json: AsJson = False) -> None:
    """Lists models with their newest and newest approved versions."""
    with deployment() as here:
        project_id = here.project_id(project)
        known = {ident: name for name, ident in here.projects().items()}
        with here.records.read() as connection:
            rows = []
            for model in models.list_models(connection, project_id):
                versions = models.list_versions(connection, model.id)
                approved = [v.number for v in versions if v.status == models.APPROVED]
                rows.append(
                    {
                        "slug": model.slug,
                        "project": known.get(model.project_id, model.project_id),
                        "versions": len(versions),
                        "newest": versions[0].number if versions else None,
                        "latest_approved": approved[0] if approved else None,
                    }
                )
    heads = ("model", "project", "versions", "newest", "newest approved")
    print_rows(rows, heads, as_json=as_json, empty="no models")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="SLUG, or SLUG/NUMBER for its files.")],
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Shows the versions of a model, or one version with its files."""
    slug, number = split_model_uri(_uri(name))
    if number:
        _show_version(_uri(name), project, as_json=as_json)
        return
    with deployment() as here, here.records.read() as connection:
        model = models.get_model(connection, here.need_project(project), slug)
        versions = models.list_versions(connection, model.id)
    if as_json:
        print_json({"slug": slug, "versions": [_as_dict(version) for version in versions]})
        return
    cells = []
    for v in versions:
        note = (v.release_note or "").partition("\n")[0]
        made = f"{v.ctime:%Y-%m-%d %H:%M}"
        cells.append([str(v.number), v.status, made, ", ".join(v.tags), note])
    print_table(("number", "status", "created", "tags", "note"), cells, empty="no versions")


def _show_version(uri: str, project: str | None, *, as_json: bool) -> None:
    with deployment() as here, here.records.read() as connection:
        version = models.get_version(connection, uri, project_id=here.need_project(project))
        files = models.files_of(connection, version.id)
    described = _as_dict(version)
    if as_json:
        print_json({**described, "files": [datum_dict(datum) for datum in files]})
        return
    for key in ("uri", "status", "tags", "execution", "release_note"):
        if described[key]:
            typer.echo(f"{key:<13} {cell_text(described[key])}")
    print_datums(files, {})


@app.command()
def create(
    slug: Annotated[str, typer.Argument(help="SLUG of the model; made when it is new.")],
    references: Annotated[
        list[str] | None,
        typer.Argument(help="Files of a new version; without any only the model is made."),
    ] = None,
    project: Project = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag of the version.")] = None,
    note: Annotated[str | None, typer.Option(help="Release note of the version.")] = None,
    as_json: AsJson = False,
) -> None:
    """Makes a model, or its next version from files that are there; it is pending then."""
    slug = slug.removeprefix(MODEL_SCHEME).rstrip("/")
    with deployment() as here:
        project_id = here.need_project(project, create=project is not None)
        with here.records.write() as connection:
            if not references:
                models.ensure_model(connection, project_id=project_id, slug=slug, now=now())
                typer.echo(f"{MODEL_SCHEME}{slug}/")
                return
            found = find_all(connection, references, project_id)
            version = models.create_version(
                connection,
                ModelWish(slug=slug, tags=tuple(tag or ()), release_note=note),
                project_id=project_id,
                datum_ids=[datum.id for datum in found],
                now=now(),
            )
    if as_json:
        print_json({**_as_dict(version), "files": len(found)})
    else:
        typer.echo(f"{version.uri}  {version.status}, {counted(len(found), 'file')}")


@app.command()
def approve(version: Version, project: Project = None) -> None:
    """Approves a version: the newest approved one is model://SLUG/latest."""
    _decide(version, project, approved=True)


@app.command()
def reject(version: Version, project: Project = None) -> None:
    """Rejects a version; its number still works."""
    _decide(version, project, approved=False)


def _decide(version: str, project: str | None, *, approved: bool) -> None:
    with _version(version, project) as (connection, found):
        models.decide(connection, found, approved=approved, now=now())
    typer.echo(f"{found.uri} is {models.APPROVED if approved else models.REJECTED}")


@app.command()
def note(
    version: Version,
    text: Annotated[str, typer.Argument(help="The release note; an empty one removes it.")],
    project: Project = None,
) -> None:
    """Sets the release note of a version."""
    with _version(version, project) as (connection, found):
        models.describe(connection, found, release_note=text)
    typer.echo(f"{found.uri} has a new release note")


@app.command()
def tag(
    version: Version,
    tags: Annotated[list[str] | None, typer.Argument(help="All tags; none removes them.")] = None,
    project: Project = None,
) -> None:
    """Replaces the tags of a version."""
    with _version(version, project) as (connection, found):
        models.describe(connection, found, tags=tags or [])
    typer.echo(f"{found.uri} has the tags {', '.join(tags or []) or 'none'}")


@contextmanager
def _version(
    version: str, project: str | None
) -> Iterator[tuple[sa.Connection, models.ModelVersion]]:
    """The version, to be changed."""
    with deployment() as here:
        project_id = here.need_project(project)
        with here.records.write() as connection:
            yield connection, models.get_version(connection, _uri(version), project_id=project_id)


def _uri(text: str) -> str:
    return text if text.startswith(MODEL_SCHEME) else f"{MODEL_SCHEME}{text}"


def _as_dict(version: models.ModelVersion) -> dict[str, Any]:
    return {
        "id": version.id,
        "uri": version.uri,
        "number": version.number,
        "status": version.status,
        "execution": version.execution_id,
        "tags": version.tags,
        "release_note": version.release_note,
        "history": version.history,
        "ctime": version.ctime.isoformat(),
    }
