"""`valohai-dagster retention`: what may be removed, and removing it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any

import typer

from valohai_dagster.cli.render import counted, in_columns, size_text
from valohai_dagster.errors import RefusedError
from valohai_dagster.executions.retention import Done, plan_records
from valohai_dagster.executions.retention_rules import KINDS, Plan
from valohai_dagster.plugin.retention import plan_events, run_retention
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings, load_settings

if TYPE_CHECKING:
    from dagster import DagsterInstance

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Remove what is older than the settings under \\[retention] keep. Records and lineage stay.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NOTHING_SET = (
    "the settings keep everything for ever; set for example [retention] logs_days = 90 in valohai.toml, "
    "see docs/lineage.md"
)
WORDS = {
    "outputs": "contents of outputs",
    "logs": "logs of attempts",
    "metadata": "metadata lines, by execution",
    "code": "archives of commits",
    "events": "rows of Dagster's event log",
}


@app.command()
def plan(
    items: Annotated[bool, typer.Option("--items", help="Name every single thing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Shows what `run` would remove, how much that is, and why other things stay."""
    settings, found = load_settings(), Plan()
    if _is_configured(settings):
        with _deployment(settings) as (records, instance):
            found = whole_plan(settings, records, instance)
    else:
        typer.echo(f"{NOTHING_SET}.", err=True)
    if as_json:
        data = found.to_dict()
        typer.echo(json.dumps(data if items else {**data, "items": None}, indent=2))
        return
    rows = [["WHAT", "COUNT", "SIZE"]]
    for kind in KINDS:
        mine = found.of(kind)
        if mine:
            size = size_text(sum(item.bytes for item in mine))
            rows.append(
                [f"{WORDS[kind]}{' (runs)' if kind == 'events' else ''}", str(len(mine)), size]
            )
    lines = in_columns(rows, right=frozenset({1, 2})) if len(rows) > 1 else ["Nothing may go."]
    lines += [
        f"  {item.name} ({item.project or 'Dagster'}): {item.why}" for item in found.items if items
    ]
    lines += [
        f"{counted(count, 'thing')} stay{'s' * (count == 1)}: {why}"
        for why, count in found.kept.most_common()
    ]
    if found.cursors:
        lines.append("There is more than was looked at; the rest is seen when this is removed.")
    typer.echo("\n".join(lines))


@app.command()
def run(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Removes it, batch by batch. It may be cut off at any time and started again."""
    total = Done()
    settings = load_settings()
    if not _is_configured(settings):
        raise RefusedError(NOTHING_SET)
    with _deployment(settings) as (records, instance):
        if not yes and not as_json and sys.stdin.isatty():
            typer.confirm("Remove what `retention plan` shows, for good?", abort=True)
        cursors: dict[str, str] = {}
        while True:
            done = run_retention(instance, records, settings, _now(), cursors=cursors)
            for kind in KINDS:
                total.add(kind, done.bytes[kind], done.counts[kind])
            total.problems += done.problems
            if not done.cursors:
                break
            cursors = done.cursors
            _say(total)
    if as_json:
        typer.echo(json.dumps(total.to_dict(), indent=2))
    else:
        _print(total)
    if total.problems:
        raise typer.Exit(1)


def whole_plan(settings: Settings, records: Records, instance: DagsterInstance | None) -> Plan:
    """Everything that may go now, in one plan."""
    whole, cursors, now = Plan(), dict[str, str](), _now()
    while True:
        part = plan_records(records, settings.retention, now, cursors=cursors)
        for item in part.items:
            whole.add(item)
        whole.kept.update(part.kept)
        if not part.cursors:
            break
        cursors = part.cursors
    if instance is not None:
        plan_events(instance, records, settings, now, whole)
    return whole


def _print(total: Done) -> None:
    rows = [["REMOVED", "COUNT", "SIZE"]]
    rows += [
        [WORDS[kind], str(total.counts[kind]), size_text(total.bytes[kind])]
        for kind in KINDS
        if total.counts[kind]
    ]
    lines = in_columns(rows, right=frozenset({1, 2})) if len(rows) > 1 else ["Nothing was removed."]
    typer.echo("\n".join([*lines, *total.problems]))


def _say(total: Done) -> None:
    if sys.stderr.isatty():
        typer.echo(f"{counted(sum(total.counts.values()), 'thing')} removed ...", err=True)


def _is_configured(settings: Settings) -> bool:
    policy = settings.retention
    return policy.events_days is not None or any(
        policy.shortest(kind) is not None for kind in KINDS[:-1]
    )


@contextmanager
def _deployment(settings: Settings) -> Iterator[tuple[Records, Any]]:
    """Its records, and the Dagster instance if it is at hand."""
    from valohai_dagster.cli.why import instance_of

    records = open_records(settings)
    try:
        with instance_of(settings) as instance:
            if instance is None and settings.retention.events_days is not None:
                text = "Dagster's event log is left out: DAGSTER_HOME is another or not set"
                typer.echo(text, err=True)
            yield records, instance
    finally:
        records.close()


def _now() -> datetime:
    return datetime.now(timezone.utc)
