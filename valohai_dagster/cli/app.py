"""The root command: finds the module of a command by its name and imports it only then."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from valohai_dagster.version import __version__

_HERE = "valohai_dagster.cli"

# Command -> module and attribute: a function for one command, a typer.Typer for a group.
COMMANDS = {
    "demo": ("demo", "demo"),
    "up": ("up", "up"),
    "doctor": ("doctor", "doctor"),
    "project": ("project", "app"),
    "why": ("why", "why"),
    "logs": ("logs", "logs"),
    "outputs": ("outputs", "outputs"),
    "metrics": ("metrics", "metrics"),
    "data": ("data", "app"),
    "stores": ("stores", "app"),
    "secrets": ("secrets", "app"),
    "retention": ("retention", "app"),
    "agents": ("agents", "app"),
    "groups": ("groups", "app"),
    "machines": ("machines", "app"),
    "cost": ("cost", "cost"),
    "conductor": ("conductor", "conductor"),
    "down": ("conductor", "down"),
}


ALIASES = {"agent": "agents"}


class LazyGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        cmd_name = ALIASES.get(cmd_name, cmd_name)
        if cmd_name not in COMMANDS:
            return None
        module_name, attribute = COMMANDS[cmd_name]
        target = getattr(importlib.import_module(f"{_HERE}.{module_name}"), attribute)
        if not isinstance(target, typer.Typer):
            wrapper = typer.Typer(add_completion=False)
            wrapper.command(name=cmd_name)(target)
            target = wrapper
        command = get_command(target)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    help="Run steps of valohai.yaml projects as Dagster assets on your own machines.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"valohai-dagster {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    pass
