"""`valohai-dagster conductor` and `valohai-dagster down`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import typer

from valohai_dagster.broker.connection import broker_url
from valohai_dagster.capacity.clouds.local import living_agents
from valohai_dagster.capacity.clouds.registry import open_driver
from valohai_dagster.capacity.model import MachineState
from valohai_dagster.embedded.conductor import is_kept_alive, running_conductor
from valohai_dagster.embedded.redis import EmbeddedRedis
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import Settings, load_settings
from valohai_dagster.settings_groups import SimulatedGroupSettings

DOWN_SECONDS = 30.0


def conductor(
    on_demand: bool = typer.Option(
        False,
        "--on-demand",
        help="End after `idle_exit_seconds` without work, with the embedded parts.",
    ),
) -> None:
    """Run the conductor: the service that follows all executions. The embedded default starts it by itself."""
    from valohai_dagster.observability.logs import set_up_logging
    from valohai_dagster.web.conductor import Ending, run_conductor

    settings = load_settings()
    set_up_logging(settings.log_format)
    if run_conductor(settings, on_demand=on_demand) is Ending.taken:
        typer.echo(f"a conductor serves {settings.state_dir} already", err=True)


def down(
    agents: bool = typer.Option(
        True, help="Also end the local agents; what they run starts again later."
    ),
) -> None:
    """Stop what runs in the background: the conductor, the local agents, the embedded Redis."""
    settings = load_settings()
    info = running_conductor(settings) if settings.state_dir.is_dir() else None
    living = living_agents(settings.state_dir) if agents else []
    # Also where another Redis is set by now: an embedded one of earlier settings would run on for nobody.
    redis = EmbeddedRedis(settings) if agents else None
    if info is not None:
        _end(info.pid, "conductor")
    for agent in living:
        _end(agent.pid, "agent")
    ended = _end_simulated(settings) if agents else 0
    stopped_redis = redis is not None and redis.running() and redis.stop()
    if stopped_redis:
        typer.echo("stopped the embedded Redis")
    if is_kept_alive(settings):
        typer.echo(
            "a Dagster webserver or daemon of this deployment still runs, and starts these again when it needs them",
            err=True,
        )
    if info is None and not living and not ended and not stopped_redis:
        typer.echo(f"nothing runs for {settings.state_dir}")


def _end_simulated(settings: Settings) -> int:
    """Simulated machines are processes of this host too; how many there were."""
    groups = {
        name: group.model_copy(update={"throttle_rate": 0.0, "listing_lag_seconds": 0.0})
        for name, group in settings.groups.items()
        if isinstance(group, SimulatedGroupSettings)
        and (settings.state_dir / "simulated" / f"{name}.json").exists()
    }
    if not groups:
        return 0
    records, number = open_records(settings), 0
    for name, group in groups.items():
        driver = open_driver(
            name,
            group,
            deployment=records.deployment_id,
            state_dir=settings.state_dir,
            redis_url=broker_url(settings),
        )
        for machine in driver.list():
            if machine.state not in (MachineState.terminating, MachineState.gone):
                driver.terminate(machine.id)
                typer.echo(f"stopped machine {machine.id}")
                number += 1
    records.close()
    return number


def _end(pid: int, what: str) -> None:
    """SIGTERM, and SIGKILL when that was not enough."""
    try:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + DOWN_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.05)
            os.kill(pid, 0)
            if _is_zombie(pid):
                break
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    typer.echo(f"stopped {what} {pid}")


def _is_zombie(pid: int) -> bool:
    """Ended, but nobody has collected it, as happens in a container without an init process. Linux only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
