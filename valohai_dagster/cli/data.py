"""`valohai-dagster data`: put files into a store as datums, list them, get them back."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
import typer

from valohai_dagster.cli.trace import trace
from valohai_dagster.data import aliases, datums, transfers
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.executions.ledger import ensure_project
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.records.tables import projects
from valohai_dagster.settings import load_settings
from valohai_dagster.stores.registry import Stores, open_stores

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Files that executions read and wrote (datums).",
)

Project = Annotated[
    str | None,
    typer.Option("--project", "-p", help="Name of the project that the files belong to."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def put(
    paths: Annotated[
        list[Path], typer.Argument(help="Files, or directories with all that lies below.")
    ],
    project: Project = None,
    name: Annotated[str | None, typer.Option(help="Name of the datum; for a single file.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag; may be given several times.")] = None,
    alias: Annotated[
        str | None, typer.Option(help="Datum alias that then points to the file; needs --project.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Store; default: default_store of the settings.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Uploads files; each becomes a new datum, also when the name exists already. Prints their datum:// URIs."""
    found = list(_files(paths, name))
    if alias is not None:
        aliases.check_alias(alias)
        if project is None or len(found) != 1:
            raise RefusedError("--alias needs --project and exactly one file")
    with _deployment() as here, _progress(sum(path.stat().st_size for path, _ in found)) as advance:
        target = here.stores.get(store) if store else here.stores.default
        project_id = here.project_id(project, create=True)
        made = []
        for path, datum_name in found:
            now = datetime.now(timezone.utc)
            datum = transfers.store_file(
                path,
                name=datum_name,
                store=target,
                project_id=project_id,
                now=now,
                tags=tag,
                progress=advance,
            )
            with here.records.write() as connection:
                datums.create_datum(connection, datum)
                if alias is not None and project_id is not None:
                    aliases.set_alias(
                        connection, project_id=project_id, name=alias, datum_id=datum.id, now=now
                    )
            made.append(datum)
    _print_put(made, as_json)


@app.command()
def get(
    references: Annotated[
        list[str], typer.Argument(help="datum://ID, datum://ALIAS, or just the id or alias.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory, or file name for a single datum.")
    ] = Path(),
    project: Project = None,
    overwrite: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
) -> None:
    """Downloads datums under their names and checks their sha256."""
    with _deployment() as here:
        project_id = here.project_id(project)
        with here.records.read() as connection:
            found = [datums.get_datum(connection, r, project_id=project_id) for r in references]
        targets = _targets(found, output)
        with _progress(sum(datum.size for datum in found)) as advance:
            for datum, target in zip(found, targets, strict=True):
                transfers.fetch_datum(
                    datum, target, stores=here.stores, overwrite=overwrite, progress=advance
                )
    for target in targets:
        typer.echo(str(target))


@app.command("ls")
def list_(
    name: Annotated[str | None, typer.Argument(help="Name, may hold *.")] = None,
    project: Project = None,
    execution: Annotated[
        str | None, typer.Option(help="Only outputs of this execution id.")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="Only with this tag; may be given several times.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most lines.")] = 50,
    purged: Annotated[bool, typer.Option(help="Also those whose content is gone.")] = False,
    as_json: AsJson = False,
) -> None:
    """Lists datums, newest first."""
    with _deployment() as here, here.records.read() as connection:
        project_id = here.project_id(project)
        found = datums.list_datums(
            connection,
            project_id=project_id,
            execution_id=execution,
            name=name,
            tags=tag or (),
            purged=purged,
            limit=limit,
        )
        names = datums.aliases_of(connection, [datum.id for datum in found])
    if as_json:
        typer.echo(
            json.dumps([_as_dict(datum, names.get(datum.id, [])) for datum in found], indent=2)
        )
    else:
        _print_table(found, names)


app.command()(trace)


@dataclass(frozen=True, kw_only=True)
class _Deployment:
    records: Records
    stores: Stores

    def project_id(self, name: str | None, *, create: bool = False) -> str | None:
        if name is None:
            return None
        if create:
            with self.records.write() as connection:
                return ensure_project(connection, name, datetime.now(timezone.utc))
        with self.records.read() as connection:
            query = sa.select(projects.c.id).where(projects.c.name == name)
            found = connection.execute(query).scalar_one_or_none()
            known = (
                connection.execute(sa.select(projects.c.name).order_by(projects.c.name))
                .scalars()
                .all()
            )
        if found is None:
            raise NotFoundError(
                f"there is no project {name!r}; known are {', '.join(known) or 'none'}"
            )
        return found


@contextmanager
def _deployment() -> Iterator[_Deployment]:
    settings = load_settings()
    records = open_records(settings)
    try:
        yield _Deployment(records=records, stores=open_stores(settings))
    finally:
        records.close()


@contextmanager
def _progress(total: int) -> Iterator[transfers.Progress | None]:
    """A bar on standard error, only where somebody looks at it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    with Progress(
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda amount: bar.advance(task, amount)


def _files(paths: list[Path], name: str | None) -> Iterator[tuple[Path, str]]:
    if name is not None and (len(paths) != 1 or paths[0].is_dir()):
        raise RefusedError("--name needs exactly one file")
    for path in paths:
        if path.is_dir():
            below = sorted(item for item in path.rglob("*") if item.is_file())
            if not below:
                raise RefusedError(f"the directory {path} holds no files")
            yield from ((item, item.relative_to(path).as_posix()) for item in below)
        elif path.is_file():
            yield path, name or path.name
        else:
            raise RefusedError(f"{path} is not a file or directory")


def _targets(found: list[datums.Datum], output: Path) -> list[Path]:
    if len(found) == 1 and str(output) != "." and not output.is_dir():
        return [output]
    targets = [transfers.local_path(output, datum) for datum in found]
    twice = next((target for target in targets if targets.count(target) > 1), None)
    if twice is not None:
        raise RefusedError(
            f"two of the datums have the name {twice.name!r}; get them one by one with --output"
        )
    return targets


def _print_put(made: list[datums.Datum], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([_as_dict(datum, []) for datum in made], indent=2))
        return
    for datum in made:
        typer.echo(f"{datum.uri}  {datum.name}")


def _as_dict(datum: datums.Datum, names: list[str]) -> dict[str, Any]:
    return {
        "id": datum.id,
        "uri": datum.uri,
        "name": datum.name,
        "size": datum.size,
        "md5": datum.md5,
        "sha1": datum.sha1,
        "sha256": datum.sha256,
        "store": datum.store,
        "key": datum.key,
        "output_execution": datum.execution_id,
        "tags": datum.tags,
        "aliases": names,
        "metadata": datum.metadata,
        "ctime": datum.ctime.isoformat(),
        "purged": datum.purged,
    }


def _print_table(found: list[datums.Datum], names: dict[str, list[str]]) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    if not found:
        typer.echo("no datums")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("uri", "name", "size", "created", "alias", "tags"):
        table.add_column(column, overflow="fold", no_wrap=column in ("uri", "created"))
    for datum in found:
        cells = [
            datum.uri,
            datum.name + (" (purged)" if datum.purged else ""),
            decimal(datum.size),
            f"{datum.ctime:%Y-%m-%d %H:%M}",
            ", ".join(names.get(datum.id, [])),
            ", ".join(datum.tags),
        ]
        table.add_row(*(escape(cell) for cell in cells))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
