"""`valohai-dagster agents build|publish|releases|use|update`: the agent that worker machines run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from valohai_agent.protocol import Command, Keys, Worker, utcnow
from valohai_dagster.broker.connection import connect
from valohai_dagster.capacity.bootstrap import releases as published
from valohai_dagster.capacity.bootstrap.agent_file import build as build_file
from valohai_dagster.capacity.bootstrap.releases import Release
from valohai_dagster.cli.render import in_columns, size_text
from valohai_dagster.errors import RefusedError
from valohai_dagster.executions.why_reader import workers_of
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings, load_settings
from valohai_dagster.stores.registry import open_store

DEFAULT_FILE = Path("dist/valohai-agent.pyz")
COMMANDS_KEPT = 1000  # of one agent's stream, as the service keeps them
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def build(
    file: Annotated[Path, typer.Argument(help="Where to.")] = DEFAULT_FILE,
    as_json: AsJson = False,
) -> None:
    """Makes the agent as one file, with all that it needs for CPython 3.10 to 3.14 on x86_64 and aarch64 (glibc).

    Needs uv or pip and a package index. The same release gives the same file.
    """
    facts = build_file(file)
    if as_json:
        typer.echo(json.dumps({"file": str(file), **vars(facts)}))
        return
    typer.echo(f"{file}: agent {facts.version}, {size_text(facts.size)}, sha256 {facts.sha256}")
    typer.echo(f"for {', '.join(facts.platforms)}")


def publish(
    file: Annotated[
        Path, typer.Argument(help="What `make agent` or `agents build` made.")
    ] = DEFAULT_FILE,
    quiet: Annotated[
        bool, typer.Option("--no-update", help="Leave the agents that run as they are.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Puts an agent file into the store of agents (`binary_store`) and gives it to every machine from now on.

    Agents that run make way for it as soon as they are idle. Older files are kept; `agents use` goes back to one.
    """
    settings = load_settings()
    with _records(settings) as records:
        store = open_store(settings, settings.binary_store_name)
        with records.read() as conn:
            before = published.current_release(conn)
        release = published.publish(records, store, file, now=utcnow())
        told = [] if quiet else _tell_others(settings, records, before, release)
    _show(release, told, as_json)


def releases(as_json: AsJson = False) -> None:
    """Lists the published agents; the current one is marked."""
    with _records(load_settings()) as records, records.read() as conn:
        found = published.releases(conn)
    if as_json:
        typer.echo(json.dumps([_data(one) for one in found], indent=2))
        return
    if not found:
        typer.echo("no agent is published; `valohai-dagster agents publish FILE` does it")
        return
    rows = [["", "VERSION", "PUBLISHED", "SIZE", "STORE", "SHA256"]]
    rows += [
        [
            "*" if one.current else "",
            one.version,
            f"{one.ctime:%Y-%m-%d %H:%M}",
            size_text(one.size),
            one.store,
            one.sha256[:16],
        ]
        for one in found
    ]
    for line in in_columns(rows):
        typer.echo(line)


def use(
    version: Annotated[str, typer.Argument(help="One of `agents releases`.")],
    quiet: Annotated[
        bool, typer.Option("--no-update", help="Leave the agents that run as they are.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Goes back (or forth) to a published agent."""
    settings = load_settings()
    with _records(settings) as records:
        release = published.use(records, version)
        told = [] if quiet else _tell_to_update(settings, records, None, release)
    _show(release, told, as_json)


def update(
    group: Annotated[
        str | None, typer.Argument(help="A worker group. Default: all of them.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Also those that have the current version.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tells agents of other versions to make way for the current one once they are idle.

    Only agents of machines that have joined (`valohai-agent join`, cloud groups) are told: others would just end.
    """
    settings = load_settings()
    if group is not None and group not in settings.groups:
        raise RefusedError(f"there is no worker group {group!r}")
    with _records(settings) as records:
        with records.read() as conn:
            release = published.current_release(conn)
        told = _tell_to_update(settings, records, group, None if restart else release)
    if as_json:
        typer.echo(json.dumps({"told": told}))
        return
    typer.echo(_told(told))


def _tell_others(
    settings: Settings, records: Records, before: Release | None, release: Release
) -> list[str]:
    """Tells the agents of other versions; all when it is another file of the same version, by which they are not told
    apart."""
    same = before and before.version == release.version and before.sha256 != release.sha256
    return _tell_to_update(settings, records, None, None if same else release)


def _tell_to_update(
    settings: Settings, records: Records, group: str | None, release: Release | None
) -> list[str]:
    """Names of the workers that were told. Without a release every one of them is."""
    keys, client = Keys(records.deployment_id), connect(settings)
    reason = f"agent {release.version} is published" if release else "asked to start again"
    command = Command(kind="update", reason=reason)
    told = []
    try:
        for name in [group] if group else settings.groups:
            for worker in workers_of(client, keys, name):
                if _is_due(worker, release):
                    stream = keys.command(name, worker.name)
                    entry = {"c": command.model_dump_json()}
                    client.xadd(stream, entry, maxlen=COMMANDS_KEPT)  # pyright: ignore[reportArgumentType]
                    told.append(worker.name)
    finally:
        client.close()
    return told


def _is_due(worker: Worker, release: Release | None) -> bool:
    return worker.supervised and (release is None or worker.version != release.version)


def _show(release: Release, told: list[str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**_data(release), "told": told}, indent=2))
        return
    typer.echo(
        f"agent {release.version} is current: {size_text(release.size)} in store {release.store}, sha256 {release.sha256}"
    )
    typer.echo(_told(told))


def _told(told: list[str]) -> str:
    if not told:
        return "no agent has to be told"
    return f"told to make way once idle: {', '.join(told)}"


def _data(release: Release) -> dict[str, object]:
    return {**vars(release), "ctime": release.ctime.isoformat()}


@contextmanager
def _records(settings: Settings) -> Iterator[Records]:
    records = open_records(settings)
    try:
        yield records
    finally:
        records.close()
