"""Servers of OpenStack Nova as the machines of a worker group, made one by one and found by their metadata.

Nova knows no token that makes a launch happen once. So the names of a launch's servers follow from its token, and it is
looked for them before they are made, also among those that are deleted already.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble, identity_tags
from valohai_dagster.capacity.clouds.openstack_errors import ADVICE, Meaning, meaning_of
from valohai_dagster.capacity.clouds.refusals import Refusals, Scope
from valohai_dagster.capacity.clouds.tidying import Tidying
from valohai_dagster.capacity.model import Machine, MachineState, Purchase
from valohai_dagster.settings_groups import OpenStackGroupSettings

if TYPE_CHECKING:
    from openstack.connection import Connection

log = logging.getLogger(__name__)

API_SECONDS = 60
PLACEMENT_SECONDS = 2.0  # that a launch waits for the scheduler's word; later ones are in the lists
POLL_SECONDS = 0.5
LOOK_BACK = timedelta(hours=1)  # among deleted servers, for those of a repeated launch
ZONE_KEY = "valohai-zone"
STOPPED_KEY = "valohai-stopped"  # by us: any other that is off powered itself off

_STATES = {
    "BUILD": MachineState.starting,
    "REBUILD": MachineState.starting,
    "SHUTOFF": MachineState.stopped,
    "DELETED": MachineState.gone,
    "SOFT_DELETED": MachineState.gone,
}
_TASKS = {
    "deleting": MachineState.terminating,
    "powering-off": MachineState.stopping,
    "powering-on": MachineState.starting,
}


class OpenStackDriver:
    """Machines of one group in one project."""

    kind = "openstack"
    can_stop = True

    def __init__(
        self,
        group: str,
        settings: OpenStackGroupSettings,
        *,
        deployment: str,
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self._group, self._settings, self._deployment = group, settings, deployment
        self._clock = clock
        self._made: Connection | None = None
        self._refusals = Refusals(clock)
        self._tidying = Tidying(group)

    def check(self) -> Sequence[str]:
        from valohai_dagster.capacity.clouds.openstack_check import problems_of

        try:
            with self._translated("look at the project"):
                return problems_of(self._connection, self._settings)
        except CloudError as error:
            return [str(error)]

    def list(self) -> Sequence[Machine]:
        with self._translated("list servers"):
            found = list(self._ours())
        return [self._machine(server, self._tidied(server)) for server in found]

    def launch(self, launch: Launch) -> Sequence[str]:
        if launch.purchase is Purchase.spot:
            raise CloudError(
                f"group {self._group}: OpenStack has no spot machines; remove `spot` from [groups.{self._group}]",
                code="NoSpot",
                trouble=Trouble.invalid,
                purchase=Purchase.spot,
            )
        made: list[str] = []
        try:
            with self._translated("launch a server", zone=launch.zone):
                there = self._of_launch(launch.token)
                made += [one.id for one in there.values() if state_of(one) not in _GOING]
                if len(there) < launch.count:
                    self._refusals.raise_kept(launch.zone, launch.purchase)
                options = self._options(launch)
                for number in range(launch.count):
                    name = _name(self._group, launch.token, number)
                    if name not in there:
                        made.append(self._create(name, options))
                self._await_placement(made, launch.zone)
        except CloudError as error:
            error.made = made
            raise
        return made

    def terminate(self, machine_id: str) -> None:
        with self._translated(f"delete server {machine_id}"):
            server = self._find(machine_id)
            if server is not None and state_of(server) not in _GOING:
                self._connection.compute.delete_server(machine_id)

    def stop(self, machine_id: str) -> None:
        with self._translated(f"stop server {machine_id}"):
            if state_of(self._here(machine_id)) not in _STOPPED:
                self._connection.compute.set_server_metadata(machine_id, **{STOPPED_KEY: "1"})
                self._connection.compute.stop_server(machine_id)

    def start(self, machine_id: str) -> None:
        with self._translated(f"start server {machine_id}"):
            if state_of(self._here(machine_id)) in _STOPPED:
                self._connection.compute.start_server(machine_id)

    def protect(self, machine_id: str, *, on: bool) -> None:
        """Nova scales nothing."""

    def close(self) -> None:
        if self._made is not None:
            session: Any = self._made.session
            self._made.close()
            if session.session is not None:
                session.session.close()
            self._made = None

    # -- servers ---------------------------------------------------------------------------------
    def _ours(self) -> Iterator[Any]:
        for server in self._connection.compute.servers(details=True):
            if self._is_ours(server):
                yield server

    def _is_ours(self, server: Any) -> bool:
        marks = server.metadata or {}
        found = (marks.get("valohai-deployment"), marks.get("valohai-group"))
        return found == (self._deployment, self._group)

    def _of_launch(self, token: str) -> dict[str, Any]:
        """By name; those that were deleted not long ago too, of which Nova shows no metadata any more."""
        since = (self._clock() - LOOK_BACK).astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        start = _name(self._group, token, "")
        recent = self._connection.compute.servers(details=True, changes_since=since)
        found = [one for one in recent if one.name.startswith(start)]
        found += [one for one in self._ours() if one.metadata.get("valohai-launch") == token]
        return {one.name: one for one in found}

    def _tidied(self, server: Any) -> MachineState:
        """Its state; one that never came up, or powered itself off, is deleted."""
        ours = STOPPED_KEY in server.metadata
        resting = server.status == "SHUTOFF" and not server.task_state
        if _never_ran(server):
            zone = server.metadata.get(ZONE_KEY, "")
            self._refusals.keep(zone, Purchase.on_demand, self._not_placed(server, zone))
        elif not resting or ours:
            if ours and server.status == "ACTIVE" and not server.task_state:  # it is back
                with suppress(CloudError), self._translated(f"mark server {server.id}"):
                    self._connection.compute.delete_server_metadata(server.id, [STOPPED_KEY])
            return state_of(server)
        gone = self._tidying.deleted(server.id, lambda: self._discard(server))
        return MachineState.terminating if gone else state_of(server)

    def _machine(self, server: Any, state: MachineState) -> Machine:
        marks: Mapping[str, str] = server.metadata
        return Machine(
            id=server.id,
            zone=marks.get(ZONE_KEY, ""),
            state=state,
            created_at=datetime.fromisoformat(server.created_at.replace("Z", "+00:00")),
            token=marks.get("valohai-launch"),
            bootstrap=marks.get("valohai-bootstrap"),
        )

    def _options(self, launch: Launch) -> dict[str, Any]:
        settings, connection = self._settings, self._connection
        image = connection.image.find_image(settings.image, ignore_missing=False)
        flavor = connection.compute.find_flavor(settings.instance_type, ignore_missing=False)
        options: dict[str, Any] = {
            "flavor_id": flavor.id,
            "networks": "auto",
            "metadata": {
                **settings.tags,
                **identity_tags(self._deployment, self._group, launch),
                ZONE_KEY: launch.zone,
            },
        }
        if settings.boot_from_volume:
            volume = {
                "boot_index": 0,
                "uuid": image.id,
                "source_type": "image",
                "destination_type": "volume",
                "volume_size": settings.disk_gb,
                "delete_on_termination": True,
            }
            options["block_device_mapping"] = [volume]
        else:
            options["image_id"] = image.id
        if settings.network:
            network = connection.network.find_network(settings.network, ignore_missing=False)
            options["networks"] = [{"uuid": network.id}]
        if launch.zone:
            options["availability_zone"] = launch.zone
        if settings.security_groups:
            options["security_groups"] = [{"name": name} for name in settings.security_groups]
        if launch.user_data:
            options["user_data"] = base64.b64encode(launch.user_data.encode()).decode()
        return options

    def _create(self, name: str, options: Mapping[str, Any]) -> str:
        server = self._connection.compute.create_server(name=name, **options)
        extra = {"action": "launch", "group": self._group}
        log.info("server %s of %s requested", server.id, self._group, extra=extra)
        return server.id

    def _await_placement(self, made: list[str], zone: str) -> None:
        """Nova accepts first and finds out later that no host has room: that is told here, if it is told soon. Those
        that have none are taken out of `made`."""
        deadline = time.monotonic() + PLACEMENT_SECONDS
        waiting, failed = list(made), list[Any]()
        while waiting:
            try:
                with self._translated("look at new servers"):
                    servers = [self._connection.compute.get_server(one) for one in waiting]
            except CloudError:  # the next list tells
                break
            failed += [one for one in servers if _never_ran(one)]
            waiting = [one.id for one in servers if _is_being_placed(one)]
            if not waiting or time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        for server in failed:
            made.remove(server.id)
            with suppress(CloudError):  # the next list does it
                self._discard(server)
        if failed:
            raise self._not_placed(failed[0], zone)

    def _not_placed(self, server: Any, zone: str) -> CloudError:
        words = str((server.fault or {}).get("message") or "the server failed to start")
        return self._error("launch a server", words, meaning_of(0, words), zone=zone)

    def _discard(self, server: Any) -> None:
        """Of no use any more, and it counts for the quota."""
        with self._translated(f"delete server {server.id}"):
            self._connection.compute.delete_server(server.id)

    def _find(self, machine_id: str) -> Any | None:
        """None when it is gone; refuses what is not of the group."""
        from openstack.exceptions import NotFoundException

        try:
            server = self._connection.compute.get_server(machine_id)
        except NotFoundException:
            return None
        if not self._is_ours(server):
            raise CloudError(
                f"group {self._group}: server {machine_id} is not of this group and was left alone",
                code="NotOurs",
                trouble=Trouble.invalid,
            )
        return server

    def _here(self, machine_id: str) -> Any:
        server = self._find(machine_id)
        if server is None:
            raise CloudError(
                f"group {self._group}: there is no server {machine_id} any more",
                code="NotFound",
                trouble=Trouble.invalid,
            )
        return server

    # -- the cloud -------------------------------------------------------------------------------
    @property
    def _connection(self) -> Connection:
        if self._made is None:
            import openstack

            self._made = openstack.connect(**connection_options(self._settings))
        return self._made

    @contextmanager
    def _translated(self, doing: str, *, zone: str = "") -> Iterator[None]:
        from keystoneauth1.exceptions import ClientException
        from openstack.exceptions import SDKException

        try:
            yield
        except (SDKException, ClientException) as error:
            status: int | None = getattr(error, "status_code", None)
            status = status or getattr(error, "http_status", None) or None
            words = str(getattr(error, "details", None) or error)
            name = type(error).__name__
            meaning = meaning_of(status, words, exception=name)
            found = self._error(doing, words, meaning, zone=zone)
            response = getattr(error, "response", None)
            after = response.headers.get("Retry-After") if response is not None else None
            if found.trouble is Trouble.credentials:
                self.close()  # they are read anew, as they may have been corrected
            found.retry_after = float(after) if after and after.isdigit() else None
            raise found from error

    def _error(self, doing: str, words: str, meaning: Meaning, *, zone: str) -> CloudError:
        where = f" in {zone}" if zone else ""
        said = shorten(words, 300, placeholder=" ...").rstrip(". ")
        advice = ADVICE[meaning.trouble].format(section=f"[groups.{self._group}]")
        return CloudError(
            f"group {self._group}: OpenStack refused to {doing}{where}: {said} ({meaning.code}); {advice}",
            code=meaning.code,
            trouble=meaning.trouble,
            zone=zone if zone and meaning.scope is Scope.zone else None,
        )


_GOING = (MachineState.terminating, MachineState.gone)
_STOPPED = (MachineState.stopping, MachineState.stopped)


def _name(group: str, token: str, number: int | str) -> str:
    return f"valohai-{group}-{token}-{number}"


def state_of(server: Any) -> MachineState:
    """A server in any other state runs as far as we can tell; its agent tells the rest."""
    return _TASKS.get(server.task_state or "") or _STATES.get(server.status, MachineState.running)


def _never_ran(server: Any) -> bool:
    going = server.task_state == "deleting"
    return server.status == "ERROR" and not server.launched_at and not going


def _is_being_placed(server: Any) -> bool:
    return server.status == "BUILD" and server.task_state in (None, "scheduling")


def connection_options(settings: OpenStackGroupSettings) -> dict[str, Any]:
    """For `openstack.connect`: an entry of clouds.yaml, the settings, or the `OS_*` variables."""
    options: dict[str, Any] = {"app_name": "valohai-dagster", "api_timeout": API_SECONDS}
    if settings.region:
        options["region_name"] = settings.region
    if settings.ca_file is not None:
        options["cacert"] = str(settings.ca_file)
    if settings.cloud is not None:
        return {**options, "cloud": settings.cloud}
    if settings.auth_url is None:
        return options
    auth: dict[str, Any] = {"auth_url": settings.auth_url}
    if settings.application_credential_id is not None:
        secret = settings.application_credential_secret
        auth["application_credential_id"] = settings.application_credential_id
        auth["application_credential_secret"] = secret.get_secret_value() if secret else ""
        options["auth_type"] = "v3applicationcredential"
    else:
        auth |= {
            "username": settings.username,
            "password": settings.password.get_secret_value() if settings.password else "",
            "project_name": settings.project,
            "user_domain_name": settings.domain,
            "project_domain_name": settings.domain,
        }
        options["auth_type"] = "password"
    return {**options, "auth": auth, "load_yaml_config": False, "load_envvars": False}
