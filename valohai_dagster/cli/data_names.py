"""`valohai-dagster data alias` and `data tag`: names and labels of datums, changed later (O-25)."""

from __future__ import annotations

from typing import Annotated

import typer

from valohai_dagster.cli.data_place import (
    AsJson,
    OfProject,
    Project,
    References,
    deployment,
    find_all,
    now,
    print_json,
    print_rows,
    print_table,
)
from valohai_dagster.cli.render import counted
from valohai_dagster.data import aliases, datums
from valohai_dagster.data.references import find_datums
from valohai_dagster.errors import NotFoundError, RefusedError

alias_app = typer.Typer(no_args_is_help=True, help="Movable names of datums, datum://NAME.")
tag_app = typer.Typer(no_args_is_help=True, help="Labels of datums.")

Name = Annotated[str, typer.Argument(help="The alias.")]


@alias_app.command("set")
def set_alias(
    name: Name,
    reference: Annotated[
        str, typer.Argument(help="The datum: id, name, datum://ID or another alias.")
    ],
    project: Project = None,
) -> None:
    """Makes or moves an alias; what it pointed to before stays in its history."""
    with deployment() as here:
        project_id = here.need_project(project)
        with here.records.write() as connection:
            found = find_datums(connection, reference, project_id=project_id)
            if len(found) != 1:
                raise RefusedError(f"{reference} names {len(found)} files; an alias points to one")
            (datum,) = found
            datums.hold(connection, [datum.id])
            aliases.set_alias(
                connection, project_id=project_id, name=name, datum_id=datum.id, now=now()
            )
    typer.echo(f"datum://{name} is {datum.uri}  {datum.name}")


@alias_app.command("ls")
def list_aliases(project: OfProject = None, as_json: AsJson = False) -> None:
    """Lists the aliases of a project, or of all."""
    with deployment() as here:
        project_id = here.project_id(project)
        known = {ident: name for name, ident in here.projects().items()}
        with here.records.read() as connection:
            found = aliases.list_aliases(connection, project_id)
    rows = [
        {
            "name": one.name,
            "uri": f"datum://{one.datum_id}",
            "file": one.file,
            "project": known.get(one.project_id, one.project_id),
            "mtime": one.mtime.isoformat(),
        }
        for one in found
    ]
    if as_json:
        print_json(rows)
        return
    cells = [[r["name"], r["uri"], r["file"], r["project"], r["mtime"][:16]] for r in rows]
    print_table(("alias", "uri", "name", "project", "moved"), cells, empty="no aliases")


@alias_app.command("history")
def history(name: Name, project: Project = None, as_json: AsJson = False) -> None:
    """Shows every datum that the alias has pointed to, oldest first."""
    with deployment() as here:
        project_id = here.need_project(project)
        with here.records.read() as connection:
            moves = aliases.alias_history(connection, project_id, name)
            found = [datums.find_datum(connection, move["datum_id"]) for move in moves]
    if not moves:
        raise NotFoundError(f"there is no alias {name!r}; `data alias ls` lists them")
    rows = [
        {
            "time": move["time"],
            "uri": f"datum://{move['datum_id']}",
            "name": datum.name if datum else "",
        }
        for move, datum in zip(moves, found, strict=True)
    ]
    print_rows(rows, ("time", "uri", "name"), as_json=as_json, empty="")


@alias_app.command("rm")
def remove_alias(name: Name, project: Project = None) -> None:
    """Removes an alias with its history; the datum stays."""
    with deployment() as here:
        project_id = here.need_project(project)
        with here.records.write() as connection:
            there = aliases.remove_alias(connection, project_id, name)
    if not there:
        raise NotFoundError(f"there is no alias {name!r}; `data alias ls` lists them")
    typer.echo(f"datum://{name} is removed")


Tag = Annotated[str, typer.Argument(help="The tag.")]


@tag_app.command("add")
def add(tag: Tag, references: References, project: Project = None) -> None:
    """Gives a tag to files."""
    _change(tag, references, project, add=True)


@tag_app.command("remove")
def remove(tag: Tag, references: References, project: Project = None) -> None:
    """Takes a tag from files."""
    _change(tag, references, project, add=False)


def _change(tag: str, references: list[str], project: str | None, *, add: bool) -> None:
    if not tag.strip() or not tag.isprintable():
        raise RefusedError(f"{tag!r} is no tag: expected some printable characters")
    with deployment() as here:
        project_id = here.only_project(project)
        with here.records.write() as connection:
            ids = sorted(datum.id for datum in find_all(connection, references, project_id))
            change = datums.add_tags if add else datums.remove_tags
            for datum_id in ids:
                change(connection, datum_id, [tag])
    typer.echo(f"{counted(len(ids), 'file')} changed")
