"""What the `data` commands share: the deployment, the project that is meant, options, and tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Annotated, Any

import sqlalchemy as sa
import typer

from valohai_dagster.cli.render import cell_text, size_text
from valohai_dagster.data import datums
from valohai_dagster.data.references import find_datums
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.executions.ledger import ensure_project
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.records.tables import projects
from valohai_dagster.settings import Settings, load_settings
from valohai_dagster.stores.registry import Stores, open_stores

REFERENCE = "datum://ID, an id, an alias, a name (with * too), dataset://NAME/VERSION, or model://SLUG/NUMBER."
Project = Annotated[
    str | None,
    typer.Option(
        "--project", "-p", help="Name of the project. Default: the only one that there is."
    ),
]
OfProject = Annotated[
    str | None,
    typer.Option("--project", "-p", help="Name of the project that the files belong to."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
References = Annotated[list[str], typer.Argument(help=REFERENCE, metavar="REF...")]


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """The records and stores that the settings name."""

    settings: Settings
    records: Records
    stores: Stores

    def project_id(self, name: str | None, *, create: bool = False) -> str | None:
        """Of the project of that name; None without a name."""
        if name is None:
            return None
        known = self.projects()
        if create and name not in known:
            typer.echo(f"the project {name!r} is new", err=True)
            with self.records.write() as connection:
                return ensure_project(connection, name, now())
        if name not in known:
            raise NotFoundError(
                f"there is no project {name!r}; known are {', '.join(known) or 'none'}"
            )
        return known[name]

    def only_project(self, name: str | None) -> str | None:
        """The named project, else the only one that there is."""
        known = self.projects()
        return (
            next(iter(known.values()))
            if name is None and len(known) == 1
            else self.project_id(name)
        )

    def need_project(self, name: str | None, *, create: bool = False) -> str:
        """The same where a project is needed."""
        found = self.project_id(name, create=create) or self.only_project(name)
        if found is None:
            known = ", ".join(self.projects()) or "none"
            raise RefusedError(f"name the project with --project; known are {known}")
        return found

    def projects(self) -> dict[str, str]:
        """Ids by name."""
        query = sa.select(projects.c.name, projects.c.id).order_by(projects.c.name)
        with self.records.read() as connection:
            return {row.name: row.id for row in connection.execute(query)}


@contextmanager
def deployment() -> Iterator[Deployment]:
    settings = load_settings()
    records = open_records(settings)
    try:
        yield Deployment(settings=settings, records=records, stores=open_stores(settings))
    finally:
        records.close()


def find_all(
    connection: sa.Connection, references: Sequence[str], project_id: str | None
) -> list[datums.Datum]:
    """What the references name, each datum once, in their order."""
    found = {
        datum.id: datum
        for reference in references
        for datum in find_datums(connection, reference, project_id=project_id)
    }
    return list(found.values())


def now() -> datetime:
    return datetime.now(timezone.utc)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def pairs(values: Sequence[str], option: str) -> dict[str, Any]:
    """`NAME=VALUE`: the value as JSON if it is any, else as text."""
    found: dict[str, Any] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise RefusedError(f"{option} {value!r} is not of the form NAME=VALUE")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def confirm(question: str, *, yes: bool) -> None:
    """Asks on a terminal; anywhere else it must have been said before."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise RefusedError(f"{question} Say --yes to do it without being asked")
    typer.confirm(question, abort=True, err=True)


def datum_dict(datum: datums.Datum, names: Sequence[str] = ()) -> dict[str, Any]:
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
        "withdrawn": datum.withdrawn,
        "tags": datum.tags,
        "aliases": list(names),
        "metadata": datum.metadata,
        "properties": datum.properties,
        "adopted": datum.adopted,
        "version": datum.version,
        "ctime": datum.ctime.isoformat(),
        "purged": datum.purged,
    }


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """A table for people; cells may hold anything. Without rows `empty` is said."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        typer.echo(empty)
        return
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading in ("uri", "created"))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def print_rows(
    rows: Sequence[Mapping[str, Any]], headings: Sequence[str], *, as_json: bool, empty: str
) -> None:
    """Rows of the same keys, as JSON or as a table with these headings."""
    if as_json:
        print_json(rows)
    else:
        cells = [[cell_text(value) for value in row.values()] for row in rows]
        print_table(headings, cells, empty=empty)


def print_datums(found: Sequence[datums.Datum], names: dict[str, list[str]]) -> None:
    rows = [
        [
            datum.uri,
            datum.name + (" (purged)" if datum.purged else ""),
            size_text(datum.size),
            f"{datum.ctime:%Y-%m-%d %H:%M}",
            ", ".join(names.get(datum.id, [])),
            ", ".join(datum.tags),
        ]
        for datum in found
    ]
    print_table(("uri", "name", "size", "created", "alias", "tags"), rows, empty="no datums")
