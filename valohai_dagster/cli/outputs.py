"""`valohai-dagster outputs RUN`: lists the files that a run made, and downloads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import typer
from rich.console import Console

from valohai_dagster.cli.download import download_all
from valohai_dagster.cli.lookup import REFERENCE_HELP, find_executions
from valohai_dagster.cli.render import counted, in_columns, size_text
from valohai_dagster.data.datums import Datum
from valohai_dagster.data.printable import printable
from valohai_dagster.data.transfers import local_path
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import load_settings
from valohai_dagster.stores.registry import open_stores


def outputs(
    run: str = typer.Argument("latest", help=REFERENCE_HELP),
    download: bool = typer.Option(False, "--download", "-d", help="Fetch the files."),
    to: Path = typer.Option(
        Path("outputs"), "--to", help="Directory for the files; made when missing."
    ),
    step: str | None = typer.Option(None, "--step", help="Only this step's files."),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Replace files that exist and differ."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """List the output files of a run or execution, or download them."""
    settings = load_settings()
    records = open_records(settings)
    with records.read() as conn:
        rows = _rows(conn, find_executions(conn, run, step=step))
    if download:
        targets = _targets(rows, to)
        download_all(targets, open_stores(settings), overwrite=overwrite)
        Console(stderr=True, quiet=as_json).print(
            f"{counted(len(targets), 'file')} in {to}", soft_wrap=True
        )
    if as_json:
        print(json.dumps([_as_dict(row, settings.datum_url(row.id)) for row in rows], indent=2))
    elif not download:
        _print(rows, settings.datum_url)


def _rows(conn: sa.Connection, executions: list[str]) -> list[Any]:
    """Datum rows with their step, in order of execution and name."""
    query = (
        sa.select(t.datums, t.executions.c.step, t.executions.c.counter)
        .join(t.executions, t.executions.c.id == t.datums.c.execution_id)
        .where(t.datums.c.execution_id.in_(executions), t.datums.c.withdrawn.is_(False))
        .order_by(t.executions.c.counter, t.datums.c.name)
    )
    return list(conn.execute(query))


def _targets(rows: list[Any], directory: Path) -> list[tuple[Datum, Path]]:
    """One step's files go straight into the directory, several steps' files into a folder per step."""
    several = len({row.execution_id for row in rows}) > 1
    targets = []
    for row in rows:
        if not row.purged:
            folder = directory / f"{row.step}-{row.counter}" if several else directory
            datum = Datum(**{c.name: getattr(row, c.name) for c in t.datums.columns})
            targets.append((datum, local_path(folder, datum)))
    return targets


def _as_dict(row: Any, url: str) -> dict[str, Any]:
    fields = ("id", "name", "size", "md5", "sha1", "sha256", "step", "counter", "execution_id")
    values = {name: getattr(row, name) for name in fields}
    return {**values, "uri": f"datum://{row.id}", "url": url, "metadata": row.metadata}


def _print(rows: list[Any], datum_url: Callable[[str], str]) -> None:
    lines = [["STEP", "FILE", "SIZE", "OPENS AT"]]
    for row in rows:
        name = f"{row.name} (purged)" if row.purged else row.name
        step = f"{row.step} #{row.counter}"
        lines.append([step, printable(name), size_text(row.size), datum_url(row.id)])
    text = in_columns(lines, right=frozenset({2})) if rows else ["No output files."]
    print("\n".join(text))
