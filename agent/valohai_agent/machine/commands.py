"""Commands for the machine under the agents: `join`, and what its services call."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from valohai_agent.errors import AgentError
from valohai_agent.machine.program import EXIT_REFUSED

logger = logging.getLogger(__name__)


ConfigDir = Annotated[
    Optional[Path],
    typer.Option(
        help="What this machine was given. Default: /etc/valohai-agent for root.",
        envvar="VALOHAI_AGENT_CONFIG_DIR",
    ),
]
WorkDir = Annotated[
    Optional[Path],
    typer.Option(
        help="Work directory of the agents. Default: /var/lib/valohai-agent for root.",
        envvar="VALOHAI_AGENT_WORK_DIR",
    ),
]


class Service(str, Enum):
    auto = "auto"
    systemd = "systemd"
    none = "none"


class OfCloud(str, Enum):
    aws = "aws"
    gcp = "gcp"
    azure = "azure"
    openstack = "openstack"


def add_commands(app: typer.Typer) -> None:
    """Each imports what it needs when it is called."""
    app.command()(join)
    app.command(hidden=True)(refresh)
    app.command(hidden=True)(dead_man)


def join(
    url: Annotated[
        str, typer.Argument(help="Address of the control plane's service (its `join_url`).")
    ],
    token: Annotated[
        Optional[str],
        typer.Option(
            help="What `valohai-dagster agents join-token GROUP` printed. Better in the variable, or in a file.",
            envvar="VALOHAI_JOIN_TOKEN",
        ),
    ] = None,
    token_file: Annotated[
        Optional[Path], typer.Option(help="File with the token; removed once it is used.")
    ] = None,
    group: Annotated[
        Optional[str], typer.Option(help="Refuse to join any other group than this.")
    ] = None,
    machine_id: Annotated[
        Optional[str],
        typer.Option(
            help="How the cloud calls this machine. Default: asked of the metadata service with --cloud, else /etc/machine-id.",
            envvar="VALOHAI_AGENT_MACHINE_ID",
        ),
    ] = None,
    cloud: Annotated[
        Optional[OfCloud], typer.Option(help="Whose metadata service to ask who this machine is.")
    ] = None,
    service: Annotated[
        Service,
        typer.Option(
            help="Run the agents as systemd services, or (none) right here. auto: as services where systemd runs."
        ),
    ] = Service.auto,
    config_dir: ConfigDir = None,
    work_dir: WorkDir = None,
) -> None:
    """Makes this machine a worker of a group: gets its credentials and keeps its agents running.

    A machine that has joined already asks again with what it was given then; its token is not needed any more.
    """
    from valohai_agent.json_logging import set_up_logging
    from valohai_agent.machine.becoming import Wanted, become_worker
    from valohai_agent.machine.identity import CloudOfMachine

    set_up_logging(as_json=False, verbose=False)
    wanted = Wanted(
        url=url,
        token=token,
        token_file=token_file,
        group=group,
        machine_id=machine_id,
        cloud=CloudOfMachine(cloud.value) if cloud else None,
        as_service={Service.auto: None, Service.systemd: True, Service.none: False}[service],
        config_dir=config_dir,
        work_dir=work_dir,
    )
    with _refusals("cannot-join"):
        raise typer.Exit(become_worker(wanted))


def refresh(config_dir: ConfigDir = None, work_dir: WorkDir = None) -> None:
    """Before each start of an agent: changed credentials, a newer agent. Failing to is not fatal."""
    from valohai_agent.json_logging import set_up_logging
    from valohai_agent.machine.joining import bring_up_to_date
    from valohai_agent.machine.places import default_places

    set_up_logging(as_json=False, verbose=False)
    with _refusals("refused"):
        bring_up_to_date(default_places(config_dir, work_dir), hostname=socket.gethostname())


def dead_man(config_dir: ConfigDir = None, work_dir: WorkDir = None) -> None:
    """Renews the machine's ticket; powers a cloud machine off when nobody has spoken to it for long and nothing runs."""
    from valohai_agent.json_logging import set_up_logging
    from valohai_agent.machine.dead_man import look, power_off
    from valohai_agent.machine.places import default_places

    set_up_logging(as_json=False, verbose=False)
    with _refusals("refused"):
        if look(default_places(config_dir, work_dir), hostname=socket.gethostname()):
            power_off()


@contextmanager
def _refusals(action: str) -> Iterator[None]:
    """An error of ours ends the command with its words and the exit code that says: starting it again will not help."""
    try:
        yield
    except AgentError as exc:
        logger.error("%s", exc, extra={"action": action})
        raise typer.Exit(EXIT_REFUSED) from None
