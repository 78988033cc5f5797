"""`valohai-dagster project`: fetch new commits of Git projects, and check a valohai.yaml."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import typer
from rich.console import Console
from rich.markup import escape

from valohai_dagster.cli.data_place import deployment, print_rows
from valohai_dagster.errors import ProjectError
from valohai_dagster.projects.lint import check_config
from valohai_dagster.projects.problems import Problem, errors_of
from valohai_dagster.projects.project import GitAuth, fetch_project, load_project
from valohai_dagster.records import tables as t
from valohai_dagster.settings import load_settings

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Projects: their commits and their valohai.yaml.",
)
TOKEN_VARIABLE = "VALOHAI_GIT_TOKEN"  # noqa: S105 - the variable's name
_STYLE = {"error": "red", "warning": "yellow", "note": "cyan"}


@app.command()
def fetch(
    source: str = typer.Argument(help="Git URL, as in load_valohai_project."),
    revision: str | None = typer.Option(None, "--revision", help="Branch or tag to show."),
    yaml_path: str = typer.Option("valohai.yaml", "--yaml-path", help="Path of the YAML file."),
    ssh_key: Path | None = typer.Option(None, "--ssh-key", help="Deploy key of a private remote."),
    reload: str | None = typer.Option(
        None, "--reload", help="Code location to reload afterwards, through the webserver."
    ),
) -> None:
    """Fetch a project's new commits; the code location uses them once it is reloaded.

    A token for HTTPS remotes is read from VALOHAI_GIT_TOKEN, never from the command line.
    """
    auth = GitAuth(token=os.environ.get(TOKEN_VARIABLE), ssh_key=ssh_key)
    project = load_project(source, revision=revision, yaml_path=yaml_path, auth=auth)
    if not project.source.is_git_url:
        typer.echo(f"{source} is a local directory: there is nothing to fetch")
    for ref in fetch_project(project):
        typer.echo(f"{ref.ref}  {ref.identifier}")
    project = load_project(source, revision=revision, yaml_path=yaml_path, auth=auth)
    commit = project.commit
    typer.echo(f"{project.name} is at {commit.identifier} ({commit.ref or 'detached'})")
    if reload:
        _reload(reload)


def _reload(location: str) -> None:
    from valohai_dagster.plugin.reload import reload_code_location

    reload_code_location(load_settings().webserver_address, location)
    typer.echo(f"reloaded the code location {location}")


@app.command("ls")
def list_(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the projects that the records know: those of executions, and those that `data put --project` has made."""
    with deployment() as here, here.records.read() as connection:
        rows = [
            {
                "name": row.name,
                "executions": row.executions,
                "files": row.files,
                "created": row.ctime.strftime("%Y-%m-%d %H:%M"),
            }
            for row in connection.execute(_known())
        ]
    print_rows(
        rows, ("name", "executions", "files", "created"), as_json=as_json, empty="no projects"
    )


def _known() -> sa.Select[Any]:
    p, e, d = t.projects.c, t.executions.c, t.datums.c
    executions = sa.select(sa.func.count()).where(e.project_id == p.id).scalar_subquery()
    files = (
        sa.select(sa.func.count())
        .where(d.project_id == p.id, d.purged.is_(False), d.withdrawn.is_(False))
        .scalar_subquery()
    )
    query = sa.select(p.name, p.ctime, executions.label("executions"), files.label("files"))
    return query.order_by(p.name)


@app.command()
def lint(
    path: Path = typer.Argument(Path("."), help="A valohai.yaml, or the directory that holds it."),
    strict: bool = typer.Option(False, "--strict", help="Warnings count as errors."),
    as_json: bool = typer.Option(False, "--json", help="Print the problems as JSON."),
) -> None:
    """Check a valohai.yaml; every problem is shown with its line and a hint. Exit code 1 on errors."""
    file = path / "valohai.yaml" if path.is_dir() else path
    try:
        problems = list(check_config(file.read_bytes()).problems)
    except OSError as error:
        raise ProjectError(f"cannot read {file}: {error.strerror}") from error
    if as_json:
        print(json.dumps([vars_of(problem) for problem in problems], indent=2))
    else:
        _print(file, problems)
    bad = [p for p in problems if p.level == "error" or (strict and p.level == "warning")]
    if bad:
        raise typer.Exit(1)


def vars_of(problem: Problem) -> dict[str, object]:
    return {name: getattr(problem, name) for name in ("level", "line", "message", "hint")}


def _print(file: Path, problems: list[Problem]) -> None:
    console = Console(highlight=False)
    for problem in problems:
        style = _STYLE[problem.level]
        place = f"{file}:{problem.line}" if problem.line else str(file)
        console.print(
            f"{escape(place)}: [{style}]{problem.level}[/{style}]: {escape(problem.message)}",
            soft_wrap=True,
        )
        if problem.hint:
            console.print(f"    -> {escape(problem.hint)}", soft_wrap=True)
    if not errors_of(problems):
        console.print(f"{file}: fine" if not problems else f"{file}: no errors")
