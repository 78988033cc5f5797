"""`valohai-dagster groups`: worker groups, what they may do, and whether their clouds let them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from decimal import Decimal
from textwrap import shorten
from typing import Annotated, Any

import typer
from pydantic import SecretStr, TypeAdapter

from valohai_dagster.capacity.clouds.base import CloudError
from valohai_dagster.capacity.clouds.registry import open_driver
from valohai_dagster.capacity.left_behind import LeftBehind, left_behind
from valohai_dagster.capacity.model import MachineState
from valohai_dagster.capacity.overrides import (
    effective,
    fitted,
    read_overrides,
    with_overrides,
    write_overrides,
)
from valohai_dagster.capacity.reading import (
    Asked,
    Line,
    asked_for,
    history,
    holds_of,
    machines_of,
)
from valohai_dagster.cli.capacity import Deployment, Live, deployment
from valohai_dagster.cli.group_checks import obstacles
from valohai_dagster.cli.render import cell_text, counted, in_columns
from valohai_dagster.errors import RefusedError, ValohaiError
from valohai_dagster.settings_groups import AnyGroupSettings, CloudGroupSettings

ASLEEP = "no service runs; the next execution starts it"
UNSEEN = "no conductor has looked after it lately; `valohai-dagster doctor` looks for one"
HIDDEN = "**********"
SHOWN = 160  # characters of how a group stands, in a list
LINES = 10  # of the history that `show` prints

app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    help="Worker groups: what they are, how they stand, whether their cloud lets them, and changing them at run time. "
    "Without a command: `ls`.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(metavar="GROUP", help="A worker group of valohai.toml.")]


@app.callback()
def plain(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_()


@app.command("ls")
def list_(as_json: AsJson = False) -> None:
    """Lists the groups: kind, machines, what waits, and why nothing comes where that is so.

    Groups that were taken out of the settings while they had machines are listed too.
    """
    with deployment() as place:
        rows = [_row(place, name) for name in sorted(place.settings.groups)]
        with place.records.read() as conn:
            left = left_behind(conn, place.settings.groups)
        rows += [_row_of_left(place, one) for one in left]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    cells = [["GROUP", "KIND", "TYPE", "MACHINES", "WORKERS", "WAITING", "STANDING"]]
    for row in rows:
        machines = f"{row['machines']}/{row['max_machines']}" if row["scales"] else "-"
        words = (row["group"], row["kind"], row["type"], machines, row["workers"], row["waiting"])
        standing = shorten(row["standing"], SHOWN, placeholder=" ... (--json tells all)")
        cells.append([*map(cell_text, words), standing])
    for line in in_columns(cells, right=frozenset({3, 4, 5})):
        typer.echo(line)


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Tells all about one group: how it stands, what is held back and why, its settings, and what happened last."""
    with deployment() as place:
        file = place.group(name)
        now = datetime.now(timezone.utc)
        with place.records.read() as conn:
            changed = read_overrides(conn, name)
            group, refused = fitted(name, file, changed)
            holds, asked = holds_of(conn, name, now), asked_for(conn, name)
            lines = history(conn, name, limit=LINES)
        row, live = _row(place, name), place.live(name)
    settings = _plain(group)
    if as_json:
        found = {
            **row,
            "settings": settings,
            "changed": _plain_values(changed),
            "holds": [_plain_values(vars(hold)) for hold in holds],
            "asked_for": [_plain_values(vars(one)) for one in asked],
            "history": [_plain_values(vars(line)) for line in lines],
        }
        typer.echo(json.dumps(found, indent=2))
        return
    for text in _standing(row, live):
        typer.echo(text)
    for hold in holds:
        where = " ".join(filter(None, (hold.zone, hold.purchase and hold.purchase.value)))
        typer.echo(f"held until {hold.until:%H:%M:%S} UTC ({where or 'everywhere'}): {hold.reason}")
    for one in asked:
        typer.echo(_asked_text(one))
    typer.echo("")
    for key in (key for key in settings if key in {*file.model_fields_set, *changed}):
        typer.echo(f"{key} = {cell_text(settings[key])}{_mark(key, file, changed, refused)}")
    typer.echo("the other settings have their defaults; --json tells them\n")
    for line in lines:
        typer.echo(line_text(line))


@app.command()
def check(
    name: Annotated[
        str | None, typer.Argument(metavar="[GROUP]", help="Default: all that have machines.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Asks the cloud whether the settings can work: credentials, image, network, quota. Starts no machine.

    Looks too whether machines could work once they are there: a published agent, and a service, Redis and stores that are
    not on addresses of this host alone. Exit code 1 when something is wrong. What was held back is asked for again at once.
    """
    with deployment() as place:
        if name is not None and not isinstance(place.group(name), CloudGroupSettings):
            raise RefusedError(
                f"group {name} has no machines of its own, so there is no cloud to ask"
            )
        names = [name] if name else _scaling(place)
        found, now = {one: _check(place, one) for one in names}, datetime.now(timezone.utc)
        with place.records.read() as conn:
            held = {one: holds_of(conn, one, now) for one in names}
        for one in names:
            place.kick(one)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for one, problems in found.items():
            typer.echo(f"{'fail' if problems else 'ok'}  {one}")
            for problem in problems:
                typer.echo(f"  {problem}")
            for hold in held[one]:
                typer.echo(f"  held back until now: {hold.reason}")
        if not found:
            typer.echo("no group has machines of its own", err=True)
    if any(found.values()):
        sys.exit(1)


@app.command("set")
def set_(
    name: Name,
    values: Annotated[
        list[str],
        typer.Argument(metavar="KEY=VALUE...", help="Such as max_machines=10 or spot=true."),
    ],
    as_json: AsJson = False,
) -> None:
    """Changes settings of a group over those of the file, at once and until `reset`.

    Conductors need no restart. VALUE is read as JSON where it is JSON, else as text.
    """
    with deployment() as place:
        _change(place, name, dict(_pair(text) for text in values), as_json)


@app.command()
def reset(
    name: Name,
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY...]", help="Default: all of them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Takes changes back: the settings of the file count again."""
    with deployment() as place:
        group = place.group(name)
        with place.records.write() as conn:
            changed = read_overrides(conn, name)
            for key in keys or list(changed):
                if changed.pop(key, None) is None and keys:
                    raise RefusedError(f"group {name}: {key!r} is as in the file already")
            write_overrides(conn, name, changed, datetime.now(timezone.utc))
        _say_changed(name, fitted(name, group, changed)[0], changed, as_json)
        _tell_conductor(place, name)


@app.command()
def enable(name: Name, as_json: AsJson = False) -> None:
    """Lets executions be launched in the group, and machines be started for it."""
    with deployment() as place:
        _change(place, name, {"enabled": True}, as_json)


@app.command()
def disable(name: Name, as_json: AsJson = False) -> None:
    """Refuses new executions in the group; its machines finish what they run, and go."""
    with deployment() as place:
        _change(place, name, {"enabled": False}, as_json)


def line_text(line: Line) -> str:
    """One line of a group's history for people."""
    about = f" [{line.machine_id}]" if line.machine_id else ""
    return f"{line.at:%Y-%m-%d %H:%M:%S}  {line.kind:10}{about} {line.text}"


def _mark(
    key: str, file: AnyGroupSettings, changed: Mapping[str, Any], refused: Mapping[str, str]
) -> str:
    if key in refused:
        return f"  (as in the file; changed to {cell_text(changed[key])}, which does not fit it)"
    return f"  (changed; the file has {cell_text(_plain(file)[key])})" if key in changed else ""


# -- reading ------------------------------------------------------------------------------------------------------------


def _row(place: Deployment, name: str) -> dict[str, Any]:
    with place.records.read() as conn:
        group, refused = fitted(name, place.settings.groups[name], read_overrides(conn, name))
    live, scales = place.live(name), isinstance(group, CloudGroupSettings)
    asleep = live.state is None and place.is_asleep()
    trouble = None if asleep else _trouble(live, scales)
    row: dict[str, Any] = {
        "group": name,
        "kind": getattr(group, "kind", ""),
        "enabled": group.enabled,
        "scales": scales,
        "type": getattr(group, "instance_type", None),
        "waiting": live.waiting,
        "workers": len(live.workers) if live.away is None else None,
        "machines": _machines(place, name, live) if scales else None,
        "max_machines": getattr(group, "max_machines", None),
        "trouble": "; ".join(filter(None, (trouble, _misfits(name, refused)))) or None,
    }
    standing = row["trouble"] or (ASLEEP if asleep else "ok")
    return {**row, "standing": standing if group.enabled or row["trouble"] else "disabled"}


def _row_of_left(place: Deployment, left: LeftBehind) -> dict[str, Any]:
    live = place.live(left.group)
    return {
        "group": left.group,
        "kind": left.kind,
        "enabled": False,
        "scales": True,
        "type": None,
        "waiting": live.waiting,
        "workers": len(live.workers) if live.away is None else None,
        "machines": left.machines,
        "max_machines": 0,
        "trouble": left.trouble,
        "standing": left.trouble,
    }


def _machines(place: Deployment, name: str, live: Live) -> int:
    """Those that are there or were asked for; where nobody has looked lately, as the records have it."""
    if live.state is not None:
        return live.state.starting + live.state.up
    with place.records.read() as conn:
        rows = machines_of(conn, name)
    return sum(row.known.machine.state is not MachineState.stopped for row in rows)


def _trouble(live: Live, scales: bool) -> str | None:
    if live.away:
        return f"Redis is away: {live.away}"
    if live.state is None and scales:
        return UNSEEN
    return live.state.trouble if live.state else None


def _misfits(name: str, refused: Mapping[str, str]) -> str | None:
    if not refused:
        return None
    keys = " ".join(refused)
    return f"{next(iter(refused.values()))}; take the change back: valohai-dagster groups reset {name} {keys}"


def _standing(row: Mapping[str, Any], live: Live) -> list[str]:
    if live.away:
        return [row["standing"]]
    workers = counted(len(live.workers), "worker")
    lines = [f"{row['waiting']} waiting, {workers} checked in"]
    state = live.state
    if state is not None:
        lines.append(f"at {state.at:%H:%M:%S} UTC: {state.summary}")
    if row["trouble"]:
        lines.append(f"trouble: {row['trouble']}")
    return lines


def _asked_text(one: Asked) -> str:
    what = f"{one.action} {one.machine_id}" if one.machine_id else f"{one.action} {one.count}"
    where = f" in {one.zone}" if one.zone else ""
    return f"asked for at {one.at:%H:%M:%S} UTC: {what}{where} ({one.purchase}): {one.reason}"


def _plain(group: AnyGroupSettings) -> dict[str, Any]:
    """Settings as JSON; secrets stay hidden, and so do the values of variables, which may be some."""
    values = {key: getattr(group, key) for key in type(group).model_fields}
    return _plain_values({**values, "env": dict.fromkeys(group.env, HIDDEN)})


def _plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    shown = {
        key: HIDDEN if isinstance(value, SecretStr) else _number(value)
        for key, value in values.items()
    }
    return TypeAdapter(dict[str, Any]).dump_python(shown, mode="json")


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else value


# -- checking and changing ------------------------------------------------------------------------------------------------


def _scaling(place: Deployment) -> list[str]:
    groups = place.settings.groups.items()
    return sorted(name for name, group in groups if isinstance(group, CloudGroupSettings))


def _check(place: Deployment, name: str) -> list[str]:
    with place.records.read() as conn:
        group = effective(conn, name, place.group(name))
    assert isinstance(group, CloudGroupSettings)
    found = obstacles(place.records, place.settings, name)
    try:
        driver = open_driver(
            name,
            group,
            deployment=place.records.deployment_id,
            state_dir=place.settings.state_dir,
        )
        try:
            return [*driver.check(), *found]
        finally:
            driver.close()
    except (CloudError, ValohaiError) as error:
        return [str(error), *found]


def _pair(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign:
        raise RefusedError(f"{text!r} is not KEY=VALUE, such as max_machines=10")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value


def _change(place: Deployment, name: str, values: Mapping[str, Any], as_json: bool) -> None:
    group = place.group(name)
    with place.records.write() as conn:
        known = read_overrides(conn, name)
        changed = {**known, **values}
        refused = fitted(name, group, known)[1].keys() - values.keys()
        fit = {key: value for key, value in changed.items() if key not in refused}
        new = with_overrides(name, group, fit)
        kept = {**changed, **{key: getattr(new, key) for key in fit}}
        write_overrides(conn, name, kept, datetime.now(timezone.utc))
    _say_changed(name, new, fit, as_json)
    _tell_conductor(place, name)


def _say_changed(
    name: str, group: AnyGroupSettings, changed: Mapping[str, Any], as_json: bool
) -> None:
    """All that is not as in the file now."""
    shown = {key: value for key, value in _plain(group).items() if key in changed}
    if as_json:
        typer.echo(json.dumps({"group": name, "changed": shown}, indent=2))
        return
    for key, value in shown.items():
        typer.echo(f"{name}: {key} = {cell_text(value)}")
    if not shown:
        typer.echo(f"{name}: all as in the file")


def _tell_conductor(place: Deployment, name: str) -> None:
    if not place.kick(name):
        typer.echo("Redis is away; conductors see the change at their next look", err=True)
