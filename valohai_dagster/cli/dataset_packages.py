"""`valohai-dagster data datasets packaging`: versions whose files are fetched in packages, and how that stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import sqlalchemy as sa
import typer

from valohai_dagster.cli.data_place import Deployment, Project, deployment, now
from valohai_dagster.cli.render import counted, size_text
from valohai_dagster.data import datasets, packages
from valohai_dagster.data.datums import require_content
from valohai_dagster.data.package_removal import remove_packages
from valohai_dagster.data.version_wishes import DATASET_SCHEME, split_dataset_uri
from valohai_dagster.embedded.conductor import ensure_conductor


def packaging(
    name: Annotated[
        str, typer.Argument(help="NAME for all its new versions, or NAME/VERSION for that one.")
    ],
    switch: Annotated[Literal["on", "off"], typer.Argument(help="on or off.")],
    project: Project = None,
) -> None:
    """Has the files of versions bundled into packages, which workers fetch faster than many small files.

    Conductors write the packages in the background; `show` tells how far they are. `off` for a version removes its
    packages; its files stay. Worth it above about 10,000 files of less than 1 MB.
    """
    uri = name if name.startswith(DATASET_SCHEME) else f"{DATASET_SCHEME}{name}"
    dataset, version = split_dataset_uri(uri)
    with deployment() as here:
        project_id = here.need_project(project)
        if version:
            _switch_version(here, uri, project_id, on=switch == "on")
        else:
            with here.records.write() as connection:
                found = datasets.get_dataset(connection, project_id, dataset)
                datasets.set_packaging(connection, found.id, switch == "on")
            which = "are packed" if switch == "on" else "are not packed any more"
            typer.echo(f"new versions of {DATASET_SCHEME}{dataset} {which}")


def _switch_version(here: Deployment, uri: str, project_id: str, *, on: bool) -> None:
    removals: list[str] = []
    note = None
    with here.records.write() as connection:
        version = datasets.get_version(connection, uri, project_id=project_id)
        if on:
            files = datasets.files_of(connection, version.id)
            for datum in files:
                require_content(datum)
            packages.want(connection, version.id, now())
            note = packages.advice([datum.size for datum in files])
        elif packages.packaging_of(connection, version.id) is not None:
            removals = packages.drop(connection, version.id, "it was switched off", now())
    remove_packages(here.records, here.stores, removals)
    what = "is to be packed" if on else "is not packed"
    typer.echo(f"{version.uri} {what}")
    if note:
        typer.echo(f"note: {note}", err=True)
    if on:
        start_packing(here, [version.id])


def start_packing(here: Deployment, version_ids: Sequence[str]) -> None:
    """Sees to it that somebody writes the packages of those versions that want some, and says who; not for long."""
    with here.records.read() as connection:
        if not packages.packagings_of(connection, version_ids):
            return
    info = ensure_conductor(here.settings)
    who = f"the conductor (pid {info.pid})" if info else "the next conductor that is free"
    typer.echo(f"{who} packs it in the background; `data datasets show` tells how far", err=True)


def described(connection: sa.Connection, version_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By version how its packages stand, for those that are to have some."""
    sums = packages.sums_of(connection, version_ids)
    return {
        version_id: {
            "state": known.state,
            "problem": known.problem,
            **dict(zip(("count", "bytes", "files"), sums.get(version_id, (0, 0, 0)), strict=True)),
        }
        for version_id, known in packages.packagings_of(connection, version_ids).items()
    }


def in_words(known: dict[str, Any] | None) -> str:
    """One cell of a table; empty for a version that is not to be packed."""
    if known is None:
        return ""
    if not known["count"]:
        return known["state"]
    return f"{known['state']}: {counted(known['count'], 'package')}, {size_text(known['bytes'])}"
