"""`valohai-dagster data`: files that executions read and wrote, and what people make of them."""

from __future__ import annotations

import typer

from valohai_dagster.cli import datasets, models
from valohai_dagster.cli.data_files import adopt, get, put
from valohai_dagster.cli.data_list import info, list_, rm
from valohai_dagster.cli.data_names import alias_app, tag_app
from valohai_dagster.cli.trace import trace

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Files that executions read and wrote (datums), datasets and models.",
)

app.command()(put)
app.command()(get)
app.command("ls")(list_)
app.command()(info)
app.command()(rm)
app.command()(adopt)
app.command()(trace)
app.add_typer(alias_app, name="alias")
app.add_typer(tag_app, name="tag")
app.add_typer(datasets.app, name="datasets")
app.add_typer(models.app, name="models")
