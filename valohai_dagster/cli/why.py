"""`valohai-dagster why RUN_OR_EXECUTION`: what it waits for or does right now, and the next step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from valohai_agent.protocol import Keys
from valohai_dagster.broker.connection import broker_url, make_client
from valohai_dagster.cli.lookup import REFERENCE_HELP, SHORTEST_PREFIX, find_executions, find_run
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.executions.why_reader import Sources, why_execution
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import Settings, load_settings

if TYPE_CHECKING:
    from dagster import DagsterInstance

LOOKED_AT = 2_000  # newest runs of the Dagster instance, for one that the records do not know


def why(
    reference: str = typer.Argument("latest", metavar="RUN", help=REFERENCE_HELP),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of words."),
) -> None:
    """Tell what a run or an execution waits for or does right now, and what to do about it."""
    settings = load_settings()
    with _sources(settings) as sources, instance_of(settings) as instance:
        lines, found = explain(sources, instance, reference)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        Console(highlight=False).print("\n".join(lines), markup=False, soft_wrap=True)


def explain(
    sources: Sources, instance: DagsterInstance | None, reference: str
) -> tuple[list[str], dict[str, Any]]:
    """Lines for people and JSON for programs. Raises NotFoundError and RefusedError as `find_executions` does."""
    run_id, executions = _find(sources, instance, reference)
    run = instance.get_run_by_id(run_id) if instance is not None and run_id else None
    if run is not None and instance is not None:
        from valohai_dagster.plugin.why_run import why_run

        told = why_run(instance, run, sources)
        return list(told.lines()), told.to_dict()
    found = [why_execution(sources, one) for one in executions]
    lines = [line for one in found for line in one.lines()]
    if run_id is not None:
        lines.append(
            "(the Dagster instance of the run is not at hand: DAGSTER_HOME is another or not set)"
        )
    return lines, {"run": run_id, "executions": [one.to_dict() for one in found]}


def _find(
    sources: Sources, instance: DagsterInstance | None, reference: str
) -> tuple[str | None, list[str]]:
    """The run that is meant, and its executions; or None and the executions that are meant."""
    with sources.records.read() as conn:
        run_id = find_run(conn, reference)
        if run_id is None and instance is not None:
            run_id = _in_dagster(instance, reference) if not _known(conn, reference) else None
        try:
            return run_id, find_executions(conn, run_id or reference)
        except NotFoundError:
            if run_id is None:
                raise
            return run_id, []


def _known(conn: Any, reference: str) -> bool:
    try:
        return bool(find_executions(conn, reference))
    except NotFoundError:
        return False


def _in_dagster(instance: DagsterInstance, reference: str) -> str | None:
    """A run that has no execution (yet), such as one in Dagster's queue."""
    reference = reference.strip().lower()
    if len(reference) < SHORTEST_PREFIX:
        return None
    fitting = [one for one in instance.get_run_ids(limit=LOOKED_AT) if one.startswith(reference)]
    if len(fitting) > 1 and reference not in fitting:
        raise RefusedError(
            f"{reference} fits several: {', '.join(fitting[:3])}; write more of the id"
        )
    return fitting[0] if fitting else None


@contextmanager
def _sources(settings: Settings) -> Iterator[Sources]:
    """Starts nothing: a Redis that is away is part of the answer."""
    records = open_records(settings)
    client = make_client(broker_url(settings))
    try:
        yield Sources(
            records=records, broker=client, keys=Keys(records.deployment_id), settings=settings
        )
    finally:
        client.close()
        records.close()


@contextmanager
def instance_of(settings: Settings) -> Iterator[DagsterInstance | None]:
    """The instance of DAGSTER_HOME, else the one that `up` and `demo` keep in the state directory."""
    chosen = os.environ.get("DAGSTER_HOME")
    home = Path(chosen) if chosen else settings.state_dir / "dagster"
    if not (home.is_dir() if chosen else (home / "dagster.yaml").is_file()):
        yield None
        return
    from dagster import DagsterInstance

    with DagsterInstance.from_config(str(home)) as instance:
        yield instance
