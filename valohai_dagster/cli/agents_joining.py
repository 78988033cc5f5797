"""`valohai-dagster agents join|join-token|new-password`: how machines get into a group, and how its password changes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from datetime import timedelta
from typing import Annotated
from urllib.parse import urlsplit

import typer

from valohai_agent.protocol import Keys, utcnow
from valohai_dagster.capacity.bootstrap.joining import (
    admit_machines,
    agents_passwords,
    change_password,
    fresh_token,
    make_user,
)
from valohai_dagster.capacity.bootstrap.releases import Release, current_release, offer
from valohai_dagster.capacity.bootstrap.user_data import bootstrap_of, user_data
from valohai_dagster.capacity.clouds.host_agents import inherited
from valohai_dagster.cli.render import counted
from valohai_dagster.data.secrets import load_secret_key
from valohai_dagster.errors import RefusedError
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings, load_settings
from valohai_dagster.stores.registry import open_stores

Group = Annotated[str, typer.Argument(help="A worker group of valohai.toml.")]
_OWN_LIFE = timedelta(minutes=10)  # of a token that is used at once
PLAIN = (
    "warning: {url} is plain HTTP. The answer is sealed to the machine, but somebody in between could pose as the control "
    "plane; put TLS in front of it and set join_url."
)


def join_token(
    group: Group,
    uses: Annotated[int, typer.Option(min=1, help="Machines that may join with it.")] = 1,
    hours: Annotated[float, typer.Option(min=0.01, help="How long it is good.")] = 24.0,
    script: Annotated[
        bool,
        typer.Option(
            "--script",
            help="Print a script instead that does it all on a bare machine: Docker, the published agent, services.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Makes a token with which machines on your premises join a group.

    It is shown once and kept nowhere. Give it to `valohai-agent join` on the machine; a machine that has joined needs it
    no more.
    """
    settings = load_settings()
    _known(settings, group)
    token, now, url = fresh_token(), utcnow(), settings.machines_url
    life = timedelta(hours=hours)
    records = open_records(settings)
    try:
        release = _release(records) if script else None
        with records.write() as conn:
            admit_machines(conn, token, group=group, uses=uses, now=now, life=life)
    finally:
        records.close()
    if urlsplit(url).scheme == "http":
        typer.echo(PLAIN.format(url=url), err=True)
    if release is not None:
        file = offer(release, settings, open_stores(settings))
        wanted = bootstrap_of(
            group, settings.groups[group], join_url=url, token=token, release=file
        )
        typer.echo(user_data(wanted), nl=False)
    elif as_json:
        until = (now + life).isoformat()
        typer.echo(json.dumps({"url": url, "group": group, "token": token, "expires_at": until}))
    else:
        typer.echo(f"VALOHAI_JOIN_TOKEN={token} valohai-agent join {url} --group {group}")
        typer.echo(
            f"good for {counted(uses, 'machine')} until {now + life:%Y-%m-%d %H:%M} UTC", err=True
        )


def join(context: typer.Context, group: Group) -> None:
    """Makes this very machine a worker of a group, where it has the settings of the deployment.

    What stands behind the group goes to `valohai-agent join`, such as `--service none` to run the agents right here.
    Other machines: `join-token`.
    """
    settings = load_settings()
    _known(settings, group)
    token = fresh_token()
    records = open_records(settings)
    try:
        with records.write() as conn:
            admit_machines(conn, token, group=group, uses=1, now=utcnow(), life=_OWN_LIFE)
    finally:
        records.close()
    handle, file = tempfile.mkstemp(prefix="valohai-join-")  # removed by the agent once it is used
    with os.fdopen(handle, "w") as out:
        out.write(token)
    command = [sys.executable, "-m", "valohai_agent", "join", settings.machines_url]
    arguments = [*command, "--group", group, "--token-file", file, *context.args]
    os.execve(sys.executable, arguments, inherited())  # noqa: S606 - no shell is wanted


def new_password(
    group: Group,
    at_once: Annotated[
        bool,
        typer.Option(
            "--at-once",
            help="The old one opens nothing any more. Agents that lose their connection come back with the new one when "
            "they are started again; what they run meanwhile cannot report.",
        ),
    ] = False,
) -> None:
    """Gives the machines of a group another password for Redis, without anybody having to know it.

    The one before stays good until the next change, and agents get the new one at their next start
    (`agents update GROUP --restart`).
    """
    settings = load_settings()
    _known(settings, group)
    key, records = load_secret_key(settings), open_records(settings)
    try:
        with records.write() as conn:
            change_password(conn, group, at_once=at_once)
            passwords = agents_passwords(conn, key, records.deployment_id, group)
            make_user(settings, Keys(records.deployment_id), group, passwords)
    finally:
        records.close()
    typer.echo(f"machines of {group} get a new password from now on")


def _release(records: Records) -> Release:
    with records.read() as conn:
        found = current_release(conn)
    if found is None:
        raise RefusedError(
            "no agent is published that the script could fetch; `valohai-dagster agents publish FILE` does it"
        )
    return found


def _known(settings: Settings, group: str) -> None:
    if group not in settings.groups:
        known = ", ".join(sorted(settings.groups))
        raise RefusedError(f"there is no worker group {group!r}; valohai.toml has: {known}")
