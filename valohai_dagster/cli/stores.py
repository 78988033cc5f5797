"""`valohai-dagster stores`: which there are, whether they work, and what lies in them that nobody has a record of."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from datetime import datetime, timedelta, timezone
from itertools import islice
from typing import Annotated, Any

import typer

from valohai_dagster.cli.checks import check_stores, store_finding, store_uses
from valohai_dagster.cli.render import cell_text, counted, in_columns
from valohai_dagster.data import own_uploads
from valohai_dagster.data.secrets import load_secret_key
from valohai_dagster.errors import ConfigurationError
from valohai_dagster.executions.sweeping import mark_removed, remove_leftovers
from valohai_dagster.executions.uploads import Leftover, leftover_of, leftovers
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings, load_settings
from valohai_dagster.stores.keys import Wildcard
from valohai_dagster.stores.registry import open_store, open_stores

AT_ONCE = 500

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="The stores: which there are, whether they work, what is left over in them.",
)


@app.command("ls")
def list_(
    name: Annotated[
        str | None, typer.Argument(help="List the objects of this store instead.")
    ] = None,
    prefix: Annotated[
        str, typer.Option("--prefix", help="Only keys that begin so; `*` and `**` select.")
    ] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Lists the configured stores, or with a name what lies in one."""
    settings = load_settings()
    if name is None:
        rows = _store_rows(settings)
        shown = (
            rows if as_json else [{**row, "place": row["problem"] or row["place"]} for row in rows]
        )
        _print_rows(shown, ("name", "kind", "uses", "place"), as_json)
        return
    store = open_store(settings, name)
    pattern = Wildcard(pattern=prefix) if "*" in prefix else None
    wanted = (
        item
        for item in store.list(pattern.root if pattern else prefix)
        if pattern is None or pattern.matches(item.key)
    )
    rows = [
        {"key": item.key, "size": item.size, "mtime": item.mtime.isoformat(timespec="seconds")}
        for item in islice(wanted, limit)
    ]
    _print_rows(rows, ("size", "mtime", "key"), as_json)
    if len(rows) == limit:
        typer.echo(f"only the first {limit} are shown; raise --limit to see more", err=True)


@app.command()
def check(
    name: Annotated[
        str | None, typer.Argument(help="Name of the store in the settings. Default: all of them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the finding as JSON.")] = False,
) -> None:
    """Writes, reads and deletes a small object, by signed requests too, as `doctor` does. Exit code 1 if that fails."""
    settings = load_settings()
    if name is None:
        findings = list(check_stores(settings))
    else:
        findings = [store_finding(settings, open_store(settings, name))]
    if as_json:
        described = [dataclasses.asdict(finding) for finding in findings]
        typer.echo(json.dumps(described if name is None else described[0], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{finding.level}  {finding.text}")
            if finding.hint:
                typer.echo(f"  -> {finding.hint}")
    if any(finding.level == "fail" for finding in findings):
        sys.exit(1)


def _store_rows(settings: Settings) -> list[dict[str, Any]]:
    """One that cannot be opened, for want of a library, says so in its row."""
    rows = []
    for name, section in settings.stores.items():
        row: dict[str, Any] = {
            "name": name,
            "kind": section.kind,
            "readonly": section.readonly,
            "uses": [use for use, chosen in store_uses(settings) if chosen == name],
        }
        try:
            rows.append({**row, "place": open_store(settings, name).uri(""), "problem": None})
        except ConfigurationError as error:
            rows.append({**row, "place": None, "problem": str(error)})
    return rows


def _print_rows(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    cells = [[cell_text(row[column]) for column in columns] for row in rows]
    for line in in_columns(
        cells, right=frozenset({columns.index("size")} if "size" in columns else ())
    ):
        typer.echo(line)


@app.command()
def sweep(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be removed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Removes uploads that nobody has brought to an end, such as those of killed workers and of a killed `data put`.

    Conductors do so by themselves; this does it now. Uploads are left alone while their attempt may go on, and until
    `sweep_after_seconds` after the end of their last URL. What belongs to a datum or a log is never touched.
    """
    settings = load_settings()
    records = open_records(settings)
    try:
        found = _find(records, settings, dry_run)
        failures = {} if dry_run else _remove(records, settings, found)
    finally:
        records.close()
    if as_json:
        typer.echo(json.dumps(_described(found, failures, dry_run), indent=2))
    else:
        _print(found, failures, dry_run)
    if failures:
        sys.exit(1)


def _find(records: Records, settings: Settings, dry_run: bool) -> list[Leftover]:
    before = datetime.now(timezone.utc) - timedelta(seconds=settings.sweep_after_seconds)
    return [*_granted(records, before), *_own(records, before, dry_run)]


def _own(records: Records, before: datetime, dry_run: bool) -> list[Leftover]:
    if dry_run:
        with records.read() as conn:
            own = own_uploads.overdue(conn, before=before)
    else:
        with records.write() as conn:
            own = own_uploads.give_up(conn, before=before)
    return [leftover_of(upload) for upload in own]


def _granted(records: Records, before: datetime) -> list[Leftover]:
    found: list[Leftover] = []
    with records.read() as conn:
        while True:
            mark = (found[-1].expires_at, found[-1].upload_id) if found else None
            more = leftovers(conn, before=before, limit=AT_ONCE, after=mark)
            found += more
            if len(more) < AT_ONCE:
                return found


def _remove(records: Records, settings: Settings, found: list[Leftover]) -> dict[str, str]:
    """Why some could not be removed, by upload id."""
    swept = remove_leftovers(found, open_stores(settings), load_secret_key(settings))
    for start in range(0, len(swept.removed), AT_ONCE):
        with records.write() as conn:
            mark_removed(conn, swept.removed[start : start + AT_ONCE], datetime.now(timezone.utc))
    return swept.failures


def _described(found: list[Leftover], failures: dict[str, str], dry_run: bool) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "uploads": [
            {
                "id": item.upload_id,
                "execution": item.execution_id,
                "attempt": item.attempt,
                "kind": item.kind,
                "name": item.name,
                "store": item.store,
                "key": item.key,
                "expired_at": item.expires_at.isoformat(),
                "removed": not dry_run and item.upload_id not in failures,
                "problem": failures.get(item.upload_id),
            }
            for item in found
        ],
    }


def _print(found: list[Leftover], failures: dict[str, str], dry_run: bool) -> None:
    for item in found:
        typer.echo(f"{item.store}  {item.key}")
    for problem, number in Counter(failures.values()).items():
        typer.echo(f"error: {number} could not be removed: {problem}", err=True)
    verb = "would be removed" if dry_run else "removed"
    typer.echo(f"{counted(len(found) - len(failures), 'unreported upload')} {verb}", err=True)
