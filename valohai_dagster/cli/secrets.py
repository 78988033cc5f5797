"""`valohai-dagster secrets`: environment variables in named groups."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from typing import Annotated

import typer

from valohai_dagster.data import secrets
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import load_settings

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Environment variables of executions, in groups that a step names in `environment-variable-groups`.",
)

Group = Annotated[
    str,
    typer.Argument(
        help="Name of the group, as written in valohai.yaml, or project:NAME for every step of a project."
    ),
]
Name = Annotated[str, typer.Argument(help="Name of the environment variable.")]


@app.command("set")
def set_(
    group: Group,
    name: Name,
    plain: Annotated[
        bool, typer.Option("--plain", help="Not a secret: shown by `ls` and in jobs.")
    ] = False,
) -> None:
    """Sets one variable; the value is asked for, or read from standard input, never from the command line."""
    value = _read_value(name, hidden=not plain)
    settings = load_settings()
    key = secrets.load_secret_key(settings)
    records = open_records(settings)
    with records.write() as connection:
        secrets.set_variable(
            connection,
            key,
            group=group,
            name=name,
            value=value,
            secret=not plain,
            now=datetime.now(timezone.utc),
        )
    records.close()
    typer.echo(f"{group}/{name} is set")


@app.command("ls")
def list_(
    group: Annotated[str | None, typer.Argument(help="Only this group.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Lists variables; values of secret ones are never shown."""
    records = open_records(load_settings())
    with records.read() as connection:
        found = secrets.list_variables(connection, group)
    records.close()
    rows = [
        {
            "group": v.group,
            "name": v.name,
            "secret": v.secret,
            "value": None if v.secret else v.value,
            "mtime": v.mtime.isoformat(),
        }
        for v in found
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo("no variables; set one with `valohai-dagster secrets set GROUP NAME`")
    for v in found:
        typer.echo(f"{v.group}/{v.name} = {'***' if v.secret else v.value}")


@app.command("rm")
def remove(group: Group, name: Name) -> None:
    """Removes one variable; executions that were queued with it keep waiting for a value and then run without."""
    records = open_records(load_settings())
    with records.write() as connection:
        removed = secrets.remove_variable(connection, group=group, name=name)
    records.close()
    if not removed:
        raise NotFoundError(
            f"there is no variable {name!r} in group {group!r}; `valohai-dagster secrets ls` lists them"
        )
    typer.echo(f"{group}/{name} is removed")


def _read_value(name: str, *, hidden: bool) -> str:
    if sys.stdin.isatty():
        return typer.prompt(f"Value of {name}", hide_input=hidden, confirmation_prompt=hidden)
    value = sys.stdin.read().removesuffix("\n").removesuffix("\r")
    if not value:
        raise RefusedError(
            f"standard input is empty; pipe the value of {name} in, or run this in a terminal to be asked"
        )
    return value
