"""`valohai-dagster agents`: what agents on other machines need to join a worker group, and which agent they run."""

from __future__ import annotations

import secrets
from typing import Annotated
from urllib.parse import quote, urlsplit, urlunsplit

import redis
import typer
from redis.exceptions import NoPermissionError

from valohai_agent.protocol import Keys
from valohai_dagster.broker.access import agent_rules, server_version, set_agent_user
from valohai_dagster.broker.connection import broker_url, connect
from valohai_dagster.cli.agents_files import build, publish, releases, update, use
from valohai_dagster.cli.agents_joining import join, join_token, new_password
from valohai_dagster.errors import ConfigurationError, RefusedError
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import Settings, load_settings

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Agents on other machines.")
for command in (join_token, build, publish, releases, use, update, new_password):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(join)


@app.command("acl")
def acl(
    group: Annotated[str, typer.Argument(help="A worker group of valohai.toml.")],
    username: Annotated[
        str | None, typer.Option(help="Name of the user. Default: DEPLOYMENT-GROUP-agents.")
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Make the user now, with a new password.")
    ] = False,
) -> None:
    """Tells the Redis user that lets agents of one group do their part and nothing else.

    Prints the Redis command, or with --apply runs it (the control plane's own user then needs `+acl|setuser`) and prints
    what the machines of the group must be given. Without an ACL file Redis forgets the user when it restarts.
    """
    settings = load_settings()
    if group not in settings.groups:
        known = ", ".join(sorted(settings.groups))
        raise RefusedError(f"there is no worker group {group!r}; valohai.toml has: {known}")
    records = open_records(settings)
    keys = Keys(records.deployment_id)
    records.close()
    user = username or f"{keys.deployment}-{group}-agents"
    client = connect(settings)
    try:
        if apply:
            password = _apply(client, keys, group, user)
            typer.echo(f"VALOHAI_AGENT_REDIS={_agent_url(settings, user, password)}")
            typer.echo(f"VALOHAI_AGENT_QUEUE={group}")
            typer.echo(f"VALOHAI_AGENT_DEPLOYMENT={keys.deployment}")
        else:
            rules = agent_rules(keys, group, version=server_version(client))
            shown = [f'"{rule}"' if " " in rule else rule for rule in rules]
            typer.echo(f"ACL SETUSER {user} {' '.join(shown)} >PASSWORD")
    finally:
        client.close()


def _apply(client: redis.Redis, keys: Keys, group: str, user: str) -> str:
    password = secrets.token_urlsafe(24)
    try:
        set_agent_user(client, keys, group, username=user, password=password)
    except NoPermissionError as error:
        raise ConfigurationError(
            f"the user of redis_url may not make users ({error}); run without --apply and give the command to "
            "somebody who may (redis-cli)"
        ) from error
    _keep(client, user)
    return password


def _keep(client: redis.Redis, user: str) -> None:
    try:
        client.acl_save()
    except redis.ResponseError as error:
        typer.echo(f"Redis keeps the user {user} until it restarts only: {error}", err=True)


def _agent_url(settings: Settings, user: str, password: str) -> str:
    """redis_url for another user; certificates of the control plane are named as they are."""
    parts = urlsplit(broker_url(settings))
    host = parts.netloc.rpartition("@")[2]
    netloc = f"{quote(user, safe='')}:{password}@{host}"
    return urlunsplit(parts._replace(netloc=netloc))
