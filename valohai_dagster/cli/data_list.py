"""`valohai-dagster data ls`, `info` and `rm`: what there is, all that is known of it, and giving up content."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import sqlalchemy as sa
import typer

from valohai_dagster.cli import dataset_packages
from valohai_dagster.cli.data_place import (
    AsJson,
    Deployment,
    OfProject,
    Project,
    References,
    Yes,
    confirm,
    datum_dict,
    deployment,
    find_all,
    now,
    print_datums,
    print_json,
)
from valohai_dagster.cli.lookup import find_executions
from valohai_dagster.cli.render import cell_text, counted, size_text
from valohai_dagster.data import datasets, datums, models, packages
from valohai_dagster.data.package_removal import remove_packages
from valohai_dagster.data.printable import printable
from valohai_dagster.data.references import find_datums
from valohai_dagster.errors import RefusedError
from valohai_dagster.records import tables as t

COUNTED = 10_000  # of the files that are not listed; more are not counted


def list_(
    name: Annotated[
        str | None, typer.Argument(help="Name, may hold *; or dataset:// or model:// URI.")
    ] = None,
    project: OfProject = None,
    execution: Annotated[
        str | None,
        typer.Option(help="Only outputs of this run or execution: an id, PROJECT#NUMBER, latest."),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="Only with this tag; may be given several times.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Only files of this version, NAME/VERSION.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most lines.")] = 50,
    purged: Annotated[bool, typer.Option(help="Also those whose content is gone.")] = False,
    as_json: AsJson = False,
) -> None:
    """Lists datums, newest first."""
    with deployment() as here:
        project_id = here.project_id(project)
        with here.records.read() as connection:
            listed = partial(
                _listed,
                connection,
                here,
                name=name,
                project=project,
                dataset=dataset,
                filters={
                    "project_id": project_id,
                    "execution_ids": find_executions(connection, execution) if execution else None,
                    "tags": tag or (),
                    "purged": purged,
                },
            )
            found, left = listed(limit=limit + 1), 0
            if len(found) > limit and not _is_version(name):
                left = len(listed(limit=limit + COUNTED)) - limit
                found = found[:limit]
            names = datums.aliases_of(connection, [datum.id for datum in found])
    if as_json:
        print_json([datum_dict(datum, names.get(datum.id, [])) for datum in found])
    else:
        print_datums(found, names)
    if left > 0:
        least = "at least " if left == COUNTED else ""
        typer.echo(f"{least}{left:,} more; --limit {limit + left} shows them too", err=True)


def _is_version(name: str | None) -> bool:
    """Whose files are all listed."""
    return name is not None and name.startswith(("dataset://", "model://"))


def _listed(
    connection: sa.Connection,
    here: Deployment,
    *,
    name: str | None,
    project: str | None,
    dataset: str | None,
    limit: int,
    filters: dict[str, Any],
) -> list[datums.Datum]:
    if name is not None and _is_version(name):
        return find_datums(connection, name, project_id=here.only_project(project))
    among = None
    if dataset is not None:
        uri = dataset if dataset.startswith("dataset://") else f"dataset://{dataset}"
        files = find_datums(connection, uri, project_id=here.only_project(project))
        among = {datum.id for datum in files}
        filters = {**filters, "project_id": None}
    return datums.list_datums(connection, name=name, limit=limit, among=among, **filters)


def info(references: References, project: Project = None, as_json: AsJson = False) -> None:
    """Shows all that is known of files: checksums, where they are from, and where they are used."""
    with deployment() as here:
        project_id = here.only_project(project)
        with here.records.read() as connection:
            found = find_all(connection, references, project_id)
            names = datums.aliases_of(connection, [datum.id for datum in found])
            uses = _uses(connection, [datum.id for datum in found])
        known = {ident: name for name, ident in here.projects().items()}
    described = [
        {
            **datum_dict(datum, names.get(datum.id, [])),
            "project": known.get(datum.project_id or ""),
            **uses[datum.id],
        }
        for datum in found
    ]
    if as_json:
        print_json(described)
        return
    for values in described:
        for key, value in values.items():
            if value not in (None, [], {}, False):
                shown = size_text(value) if key == "size" else cell_text(value)
                typer.echo(f"{key:<19} {printable(shown)}")
        typer.echo("")


def rm(
    references: References,
    project: Project = None,
    yes: Yes = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Also what a version or alias names, or an execution reads that has not ended.",
        ),
    ] = False,
    delete_adopted: Annotated[
        bool,
        typer.Option("--delete-adopted", help="Delete the content of adopted files too."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Purges files: deletes their content for good and keeps their records, so that lineage stays whole.

    Adopted files are only given up: their content belongs to somebody else and stays, unless --delete-adopted.
    """
    with deployment() as here:
        project_id = here.only_project(project)
        with here.records.read() as connection:
            named = find_all(connection, references, project_id)
            found = [datum for datum in named if not datum.purged or datum.purged_at is None]
            ids = [datum.id for datum in found]
            uses = _uses(connection, ids)
            names = datums.aliases_of(connection, ids)
        _refuse_used(found, uses, names, force=force)
        size = size_text(sum(datum.size for datum in found))
        confirm(f"Delete the content of {counted(len(found), 'file')} ({size}) for good?", yes=yes)
        deleted = _purge(here, found, adopted_too=delete_adopted, force=force)
    if as_json:
        gone = {datum.id for datum in deleted}
        print_json([{"id": d.id, "name": d.name, "content_deleted": d.id in gone} for d in found])
        return
    kept = len(found) - len(deleted)
    left = f"; the content of {kept} was left where it is, adopted or shared" if kept else ""
    typer.echo(f"purged {counted(len(found), 'file')}{left}")


def _purge(
    here: Deployment, found: Sequence[datums.Datum], *, adopted_too: bool, force: bool
) -> list[datums.Datum]:
    """Those whose content is deleted; what is cut off in between is brought to its end by retention.

    Whoever uses them is looked at once more, since a person may take a while to answer.
    """
    ids = [datum.id for datum in found]
    with here.records.write() as connection:
        for start in range(0, len(ids), datums.CHUNK):
            datums.lock(connection, ids[start : start + datums.CHUNK])
        names = datums.aliases_of(connection, ids)
        _refuse_used(found, _uses(connection, ids), names, force=force)
        datums.mark_purged(connection, ids)
        removals = packages.drop_holding(connection, ids, now())
    remove_packages(here.records, here.stores, removals)
    deleted: list[datums.Datum] = []
    ended: list[str] = []
    try:
        for datum in found:
            with here.records.read() as connection:
                shared = datums.is_shared(connection, datum)
            if not shared and datums.delete_content(here.stores, datum, adopted_too=adopted_too):
                deleted.append(datum)
            ended.append(datum.id)
    finally:
        with here.records.write() as connection:
            datums.end_purge(connection, ended, now())
    return deleted


def _uses(connection: sa.Connection, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By datum: versions that hold it, and how many executions had it as an input; of those some that have not ended."""
    c, e = t.execution_inputs.c, t.executions.c
    of_datasets = datasets.versions_holding(connection, ids)
    of_models = models.versions_holding(connection, ids)
    counts: dict[str, int] = {}
    readers: dict[str, list[str]] = {}
    for start in range(0, len(ids), datums.CHUNK):
        query = (
            sa.select(c.datum_id, sa.func.count(sa.distinct(c.execution_id)))
            .where(c.datum_id.in_(ids[start : start + datums.CHUNK]))
            .group_by(c.datum_id)
        )
        counts.update((row[0], row[1]) for row in connection.execute(query))
        read = (
            sa.select(c.datum_id, e.id, e.step, e.counter, e.status)
            .join(t.executions, e.id == c.execution_id)
            .where(c.datum_id.in_(ids[start : start + datums.CHUNK]), e.ended_at.is_(None))
            .distinct()
        )
        for row in connection.execute(read):
            text = f"{row.step} #{row.counter} ({row.status})"
            readers.setdefault(row.datum_id, []).append(text)
    version_ids = list({version.id for held in of_datasets.values() for version in held})
    packed = dataset_packages.described(connection, version_ids)
    return {
        i: {
            "dataset_versions": [version.uri for version in of_datasets.get(i, ())],
            "packages": [
                f"{version.uri}: {dataset_packages.in_words(packed[version.id])}"
                for version in of_datasets.get(i, ())
                if version.id in packed
            ],
            "model_versions": [version.uri for version in of_models.get(i, ())],
            "used_by_executions": counts.get(i, 0),
            "needed_by": readers.get(i, []),
        }
        for i in ids
    }


def _refuse_used(
    found: Sequence[datums.Datum],
    uses: dict[str, dict[str, Any]],
    names: dict[str, list[str]],
    *,
    force: bool,
) -> None:
    """What a version or an alias names would break for whoever uses that next; what is read now, for who reads it."""
    used: list[str] = []
    for datum in found:
        by = [
            *uses[datum.id]["dataset_versions"],
            *uses[datum.id]["model_versions"],
            *(f"datum://{name}" for name in names.get(datum.id, [])),
        ]
        needed = uses[datum.id]["needed_by"]
        told = [f"is in {', '.join(by[:5])}"] * bool(by)
        told += [f"is an input of {', '.join(needed[:5])}"] * bool(needed)
        if told:
            used.append(f"{datum.uri} ({printable(datum.name)}) {' and '.join(told)}")
    if used and not force:
        more = f" and {len(used) - 5} more" if len(used) > 5 else ""
        raise RefusedError(f"{'; '.join(used[:5])}{more}. Say --force to delete the content anyway")
