"""From a bare machine to a worker: identity, token, credentials, the published agent, and what keeps it running."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass, field
from pathlib import Path

from valohai_agent.machine import services
from valohai_agent.machine.identity import CloudOfMachine, machine_id
from valohai_agent.machine.joining import (
    CannotJoin,
    bring_up_to_date,
    join,
    own_file,
    take_release,
)
from valohai_agent.machine.keeping import Keeper
from valohai_agent.machine.places import Machine, NotJoined, Places, default_places
from valohai_agent.machine.program import program

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What `join` was asked for. `as_service` None: where systemd runs."""

    url: str
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    group: str | None = None
    machine_id: str | None = None
    cloud: CloudOfMachine | None = None
    as_service: bool | None = None
    config_dir: Path | None = None
    work_dir: Path | None = None


def become_worker(wanted: Wanted) -> int:
    """Returns at once where services run the agents, else when they have ended; the exit code. Raises AgentError."""
    places = default_places(wanted.config_dir, wanted.work_dir)
    machine = _known(wanted, places) or _join(wanted, places)
    if wanted.token_file is not None:
        wanted.token_file.unlink(missing_ok=True)
    as_service = services.has_systemd() if wanted.as_service is None else wanted.as_service
    if as_service:
        services.install(places, machine, program())
        return 0
    places.work.mkdir(parents=True, exist_ok=True)
    return Keeper(places, machine, program()).run()


def _known(wanted: Wanted, places: Places) -> Machine | None:
    """A machine that was stopped and starts again comes back as the one it was; a copy of its disk does not."""
    try:
        before = places.load()
    except NotJoined:
        return None
    same = before.url == wanted.url.rstrip("/") and wanted.group in (None, before.answer.group)
    if not same or (wanted.machine_id or machine_id(wanted.cloud)) != before.machine_id:
        return None
    logger.info("has joined %s before", before.answer.group, extra={"action": "rejoined"})
    return bring_up_to_date(places, hostname=socket.gethostname())


def _join(wanted: Wanted, places: Places) -> Machine:
    token = wanted.token or (wanted.token_file and _read(wanted.token_file))
    if not token:
        raise CannotJoin(
            "There is no token: give one with --token-file or VALOHAI_JOIN_TOKEN. "
            "`valohai-dagster agents join-token GROUP` makes it."
        )
    known_as = wanted.machine_id or machine_id(wanted.cloud)
    machine = join(wanted.url, token.strip(), known_as, hostname=socket.gethostname())
    group = machine.answer.group
    if wanted.group not in (None, group):
        raise CannotJoin(f"The token is of the group {group!r}, not of {wanted.group!r}.")
    places.save(machine)
    file = own_file()
    if file is not None:
        take_release(machine.answer.release, file)
    logger.info(
        "machine %s has joined group %s",
        known_as,
        group,
        extra={"action": "joined", "group": group},
    )
    return machine


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise CannotJoin(f"The token file {file} cannot be read: {error.strerror}.") from error
