"""`valohai-dagster data datasets`: named sets of files in versions that never change."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from valohai_dagster.cli import dataset_packages
from valohai_dagster.cli.data_place import (
    AsJson,
    OfProject,
    Project,
    datum_dict,
    deployment,
    find_all,
    now,
    pairs,
    print_datums,
    print_json,
    print_rows,
    print_table,
)
from valohai_dagster.cli.render import counted, size_text
from valohai_dagster.data import datasets
from valohai_dagster.data.version_wishes import DATASET_SCHEME, split_dataset_uri
from valohai_dagster.errors import NotFoundError

app = typer.Typer(no_args_is_help=True, help="Datasets: named sets of files, in versions.")
alias_app = typer.Typer(no_args_is_help=True, help="Movable names of versions.")
app.add_typer(alias_app, name="alias")
app.command("packaging")(dataset_packages.packaging)

Version = Annotated[
    str, typer.Argument(help="NAME/VERSION or NAME/ALIAS, with or without dataset://.")
]
Properties = Annotated[
    list[str] | None,
    typer.Option("--property", help="NAME=VALUE, JSON or text; may be given several times."),
]


@app.command("ls")
def list_(project: OfProject = None, as_json: AsJson = False) -> None:
    """Lists datasets with their newest versions."""
    with deployment() as here:
        project_id = here.project_id(project)
        known = {ident: name for name, ident in here.projects().items()}
        with here.records.read() as connection:
            rows = [
                {
                    "name": one.name,
                    "project": known.get(one.project_id, one.project_id),
                    "versions": [v.name for v in datasets.list_versions(connection, one.id)],
                    "aliases": list(datasets.aliases_of_dataset(connection, one.id)),
                    "properties": one.properties,
                    "packaging": one.packaging,
                    "ctime": one.ctime.isoformat(),
                }
                for one in datasets.list_datasets(connection, project_id)
            ]
    if as_json:
        print_json(rows)
        return
    cells = [[r["name"], r["project"], _few(r["versions"]), ", ".join(r["aliases"])] for r in rows]
    print_table(("dataset", "project", "versions", "aliases"), cells, empty="no datasets")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="NAME, or NAME/VERSION for its files.")],
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Shows the versions of a dataset, or the files of one version."""
    dataset_name, version_name = split_dataset_uri(_uri(name))
    if version_name:
        _show_version(_uri(name), project, as_json=as_json)
        return
    with deployment() as here, here.records.read() as connection:
        dataset = datasets.get_dataset(connection, here.need_project(project), dataset_name)
        versions = datasets.list_versions(connection, dataset.id)
        aliases = datasets.aliases_of_dataset(connection, dataset.id)
        packed = dataset_packages.described(connection, [version.id for version in versions])
    rows = [{**_as_dict(v, aliases), "packages": packed.get(v.id)} for v in versions]
    if as_json:
        described = {"name": dataset.name, "properties": dataset.properties}
        print_json({**described, "packaging": dataset.packaging, "versions": rows})
        return
    cells = []
    for row in rows:
        closed = (row["closed_at"] or "")[:16].replace("T", " ")
        names = ", ".join(row["aliases"])
        packages = dataset_packages.in_words(row["packages"])
        cells.append([row["name"], row["state"], closed, names, packages, row["execution"] or ""])
    heads = ("version", "state", "closed", "aliases", "packages", "execution")
    print_table(heads, cells, empty="no versions")


def _show_version(uri: str, project: str | None, *, as_json: bool) -> None:
    with deployment() as here, here.records.read() as connection:
        version = datasets.get_version(connection, uri, project_id=here.need_project(project))
        files = datasets.files_of(connection, version.id)
        aliases = datasets.aliases_of_dataset(connection, version.dataset_id)
        packages = dataset_packages.described(connection, [version.id]).get(version.id)
    if as_json:
        described = {**_as_dict(version, aliases), "packages": packages}
        print_json({**described, "files": [datum_dict(datum) for datum in files]})
        return
    total = size_text(sum(datum.size for datum in files))
    typer.echo(f"{version.uri}: {counted(len(files), 'file')}, {total}")
    if packages is not None:
        problem = f" ({packages['problem']})" if packages["problem"] else ""
        typer.echo(f"packages {dataset_packages.in_words(packages)}{problem}")
    print_datums(files, {})


@app.command()
def create(
    version: Annotated[str, typer.Argument(help="NAME for an empty dataset, else NAME/VERSION.")],
    references: Annotated[
        list[str] | None,
        typer.Argument(help="Files of the version: ids, aliases, other versions, names with *."),
    ] = None,
    project: Project = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag of the version.")] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Dataset alias that then points to it.")
    ] = None,
    property_: Properties = None,
    as_json: AsJson = False,
) -> None:
    """Makes a dataset, or a version of one from files that are there; versions never change afterwards."""
    uri = _uri(version)
    name, version_name = split_dataset_uri(uri)
    properties = pairs(property_ or [], "--property")
    with deployment() as here:
        project_id = here.need_project(project, create=project is not None)
        with here.records.write() as connection:
            dataset = datasets.ensure_dataset(
                connection, project_id=project_id, name=name, now=now()
            )
            if not version_name:
                datasets.set_properties(connection, dataset, properties)
                typer.echo(f"{DATASET_SCHEME}{name}")
                return
            found = find_all(connection, references or [], project_id)
            made = datasets.create_version(
                connection,
                project_id=project_id,
                uri=uri,
                datum_ids=[datum.id for datum in found],
                now=now(),
                tags=tag or (),
                properties=properties,
            )
            for one in alias or []:
                datasets.point_alias(connection, made, name=one, now=now())
        dataset_packages.start_packing(here, [made.id])
    if as_json:
        print_json({**_as_dict(made, {}), "aliases": alias or [], "files": len(found)})
    else:
        typer.echo(f"{made.uri}  {counted(len(found), 'file')}")


@app.command("properties")
def set_properties(
    name: Annotated[str, typer.Argument(help="NAME, or NAME/VERSION.")],
    property_: Annotated[
        list[str], typer.Argument(help="NAME=VALUE, JSON or text; NAME=null removes one.")
    ],
    project: Project = None,
) -> None:
    """Changes properties of a dataset or of one version; files never change."""
    uri = _uri(name)
    dataset_name, version_name = split_dataset_uri(uri)
    with deployment() as here:
        project_id = here.need_project(project)
        with here.records.write() as connection:
            target: Any = datasets.get_dataset(connection, project_id, dataset_name)
            if version_name:
                target = datasets.get_version(connection, uri, project_id=project_id)
            datasets.set_properties(connection, target, pairs(property_, "property"))
    typer.echo(f"{uri} has new properties")


@alias_app.command("set")
def set_alias(
    alias: Annotated[str, typer.Argument(help="The alias.")],
    version: Version,
    project: Project = None,
) -> None:
    """Makes or moves an alias of a dataset; what it pointed to before stays in its history."""
    with deployment() as here:
        project_id = here.need_project(project)
        with here.records.write() as connection:
            found = datasets.get_version(connection, _uri(version), project_id=project_id)
            datasets.point_alias(connection, found, name=alias, now=now())
    typer.echo(f"{DATASET_SCHEME}{found.dataset}/{alias} is {found.uri}")


@alias_app.command("history")
def history(
    alias: Annotated[str, typer.Argument(help="NAME/ALIAS.")],
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Shows every version that the alias has pointed to, oldest first."""
    name, wanted = split_dataset_uri(_uri(alias))
    with deployment() as here, here.records.read() as connection:
        dataset = datasets.get_dataset(connection, here.need_project(project), name)
        moves = datasets.alias_history(connection, dataset.id, wanted)
        found = [datasets.version_by_id(connection, move["version_id"]) for move in moves]
    if not moves:
        raise NotFoundError(f"dataset {name!r} has no alias {wanted!r}")
    rows = [
        {"time": move["time"], "uri": version.uri if version else ""}
        for move, version in zip(moves, found, strict=True)
    ]
    print_rows(rows, ("time", "uri"), as_json=as_json, empty="")


@alias_app.command("rm")
def remove_alias(
    alias: Annotated[str, typer.Argument(help="NAME/ALIAS.")], project: Project = None
) -> None:
    """Removes an alias with its history; the versions stay."""
    name, wanted = split_dataset_uri(_uri(alias))
    with deployment() as here:
        project_id = here.need_project(project)
        with here.records.write() as connection:
            dataset = datasets.get_dataset(connection, project_id, name)
            there = datasets.remove_alias(connection, dataset.id, wanted)
    if not there:
        raise NotFoundError(f"dataset {name!r} has no alias {wanted!r}")
    typer.echo(f"{DATASET_SCHEME}{name}/{wanted} is removed")


def _uri(text: str) -> str:
    return text if text.startswith(DATASET_SCHEME) else f"{DATASET_SCHEME}{text}"


def _as_dict(version: datasets.DatasetVersion, aliases: dict[str, str]) -> dict[str, Any]:
    return {
        "id": version.id,
        "uri": version.uri,
        "name": version.name,
        "state": version.state,
        "execution": version.execution_id,
        "tags": version.tags,
        "properties": version.properties,
        "aliases": [name for name, target in aliases.items() if target == version.id],
        "ctime": version.ctime.isoformat(),
        "closed_at": version.closed_at.isoformat() if version.closed_at else None,
    }


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
