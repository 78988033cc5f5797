"""`valohai-dagster machines`: every machine of every group, and why it is there or went."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Annotated, Any

import typer

from valohai_dagster.capacity.reading import MachineRow, history, machines_named, machines_of
from valohai_dagster.cli.capacity import Live, deployment
from valohai_dagster.cli.groups import line_text
from valohai_dagster.cli.render import in_columns, seconds_text
from valohai_dagster.errors import NotFoundError

app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    help="Machines of worker groups: age, state, cost so far, and the reason of everything that was done with them. "
    "Without a command: `ls`.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def plain(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_()


@app.command("ls")
def list_(
    group: Annotated[str | None, typer.Option("--group", help="Only of this group.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Those that are gone too.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Lists the machines, newest first."""
    with deployment() as place:
        if group is not None:
            place.group(group)
        with place.records.read() as conn:
            rows = machines_of(conn, group, gone=every, limit=limit)
        live = {name: place.live(name) for name in {row.group for row in rows}}
    now = datetime.now(timezone.utc)
    found = [_described(row, live, now) for row in rows]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    cells = [["GROUP", "MACHINE", "STATE", "AGE", "COST", "ZONE", "PURCHASE", "REASON"]]
    for one in found:
        age, cost = seconds_text(one["age_seconds"]), _money(one["cost"])
        where = (one["zone"] or "-", one["purchase"])
        cells.append(
            [one["group"], one["machine"], one["state"], age, cost, *where, one["reason"] or ""]
        )
    if found:
        for line in in_columns(cells, right=frozenset({3, 4})):
            typer.echo(line)
    else:
        typer.echo("there are no machines", err=True)


@app.command()
def show(
    machine: Annotated[str, typer.Argument(help="Its id as the cloud has it, or how that begins.")],
    as_json: AsJson = False,
) -> None:
    """Tells all about one machine and what happened to it."""
    with deployment() as place:
        with place.records.read() as conn:
            rows = machines_named(conn, machine)
            if not rows:
                text = f"no machine {machine!r} is known; `valohai-dagster machines ls --all` lists all"
                raise NotFoundError(text)
            lines = {
                row.known.machine.id: history(
                    conn, row.group, machine_id=row.known.machine.id, limit=200
                )
                for row in rows
            }
        live = {name: place.live(name) for name in {row.group for row in rows}}
    now = datetime.now(timezone.utc)
    found = [
        {
            **_described(row, live, now),
            "history": [
                {"at": line.at.isoformat(), "kind": line.kind, "text": line.text}
                for line in lines[row.known.machine.id]
            ],
        }
        for row in rows
    ]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for one, row in zip(found, rows, strict=True):
        for text in _words(one):
            typer.echo(text)
        for line in lines[row.known.machine.id]:
            typer.echo(line_text(line))


@app.command("history")
def history_(
    group: Annotated[str | None, typer.Argument(metavar="[GROUP]", help="Default: all.")] = None,
    number: Annotated[int, typer.Option("--lines", "-n", min=1, help="So many, the newest.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Tells what was decided and what happened, line by line, with the reasons."""
    with deployment() as place:
        if group is not None:
            place.group(group)
        with place.records.read() as conn:
            lines = history(conn, group, limit=number)
    if as_json:
        typer.echo(json.dumps([{**vars(one), "at": one.at.isoformat()} for one in lines], indent=2))
        return
    for line in lines:
        typer.echo(f"{line.group}  {line_text(line)}")
    if not lines:
        typer.echo("nothing has happened yet", err=True)


def _described(row: MachineRow, live: Mapping[str, Live], now: datetime) -> dict[str, Any]:
    known, machine, of_group = row.known, row.known.machine, live[row.group]
    cost = row.cost(now)
    return {
        "group": row.group,
        "machine": machine.id,
        "state": row.state(of_group.busy(machine.id)),
        "age_seconds": round(row.age(now), 1),
        "cost": float(cost) if cost is not None else None,
        "kind": row.kind,
        "zone": machine.zone,
        "purchase": machine.purchase.value,
        "created_at": _when(machine.created_at),
        "checked_in_at": _when(known.registered_at),
        "draining_since": _when(known.draining_since),
        "stopped_since": _when(known.stopped_since),
        "gone_at": _when(known.gone_at),
        "adopted": known.adopted,
        "agent": machine.bootstrap,
        "workers": sorted(one.name for one in of_group.workers if one.machine_id == machine.id),
        "reason": known.reason,
    }


def _words(one: Mapping[str, Any]) -> Iterator[str]:
    """One machine for people, without what there is nothing to say of."""
    for key, value in one.items():
        if key == "history" or value in (None, "", False, []):
            continue
        if key == "age_seconds":
            yield f"age: {seconds_text(value)}"
        elif key == "cost":
            yield f"cost: {_money(value)}"
        elif key.endswith(("_at", "_since")):
            yield f"{key.replace('_', ' ')}: {datetime.fromisoformat(value):%Y-%m-%d %H:%M:%S} UTC"
        else:
            words = (
                ", ".join(value) if isinstance(value, list) else "yes" if value is True else value
            )
            yield f"{key}: {words}"


def _when(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def _money(cost: float | None) -> str:
    return "-" if cost is None else f"{cost:.2f}"
