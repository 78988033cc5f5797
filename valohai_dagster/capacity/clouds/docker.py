"""Containers of one Docker host as the machines of a worker group: real isolation without a cloud.

A machine is a container that runs its launch's user data and nothing else. It is over when that ends, as a machine
is that powers itself off. What is left of it stays for some minutes more: its output can be read with `docker logs`, and
its name tells a late repetition of the launch that this was made already.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shlex
import socket
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.clouds.base import CloudError, Launch, Trouble, identity_tags
from valohai_dagster.capacity.clouds.docker_errors import classify
from valohai_dagster.capacity.model import Machine, MachineState, Purchase
from valohai_dagster.settings_groups import DockerGroupSettings

if TYPE_CHECKING:
    from docker import DockerClient

log = logging.getLogger(__name__)

DEFAULT_HOST = "unix:///var/run/docker.sock"
API_SECONDS = 60
STOP_SECONDS = 10  # from the polite signal to the other one
REST_KEPT = timedelta(minutes=15)  # of machines that have ended
HOST_ALIAS = "host.docker.internal"  # how containers call this host
ZONE_LABEL, PURCHASE_LABEL = "valohai-zone", "valohai-purchase"
USER_DATA = "valohai-user-data"  # the file in the machine's root directory
LAUNCH_LABEL, BOOTSTRAP_LABEL = "valohai-launch", "valohai-bootstrap"

# A label cannot change, a restart policy can: this one says that a stopped container was stopped by us and may start
# again. Docker itself leaves such a one stopped. Any other that has ended powered itself off.
_STOPPED_BY_US = "unless-stopped"

_STATES = {
    "created": MachineState.starting,
    "restarting": MachineState.starting,
    "running": MachineState.running,
    "paused": MachineState.running,
    "removing": MachineState.terminating,
    "dead": MachineState.terminating,  # Docker's word for a removal that failed half way
}


class DockerDriver:
    """Machines of one group on one daemon, found by their labels."""

    kind = "docker"
    can_stop = True

    def __init__(
        self,
        group: str,
        settings: DockerGroupSettings,
        *,
        deployment: str,
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self._group, self._settings, self._deployment = group, settings, deployment
        self._clock = clock
        self._made: DockerClient | None = None

    def check(self) -> Sequence[str]:
        try:
            with self._translated("look at the host"):
                facts = self._client.info()
        except CloudError as error:
            return [str(error)]
        problems = list(_lacking(self._settings, facts))
        for look in (self._look_at_image, self._look_at_network):
            try:
                look()
            except CloudError as error:
                problems.append(str(error))
        return problems

    def list(self) -> Sequence[Machine]:
        with self._translated("list the machines"):
            found = self._client.api.containers(all=True, filters=self._filters())
            machines = [self._machine(summary) for summary in found]
        return [machine for machine in machines if machine is not None]

    def launch(self, launch: Launch) -> Sequence[str]:
        names = [
            machine_name(self._deployment, self._group, launch.token, number)
            for number in range(launch.count)
        ]
        place: dict[str, Any] = {"zone": launch.zone or None, "purchase": launch.purchase}
        for number, name in enumerate(names):
            try:
                with self._translated(f"launch {name}", **place):
                    self._launch(name, launch)
            except CloudError as error:
                error.made = names[:number]
                raise
        return names

    def terminate(self, machine_id: str) -> None:
        with self._translated(f"terminate {machine_id}"):
            container = self._ours(machine_id)
            if container is not None:
                _end(container)

    def stop(self, machine_id: str) -> None:
        with self._translated(f"stop {machine_id}"):
            container = self._here(machine_id)
            container.update(restart_policy={"Name": _STOPPED_BY_US})
            container.stop(timeout=STOP_SECONDS)

    def start(self, machine_id: str) -> None:
        with self._translated(f"start {machine_id}"):
            container = self._here(machine_id)
            container.start()
            container.update(restart_policy={"Name": "no"})

    def protect(self, machine_id: str, *, on: bool) -> None:
        """Nobody else scales containers."""

    def close(self) -> None:
        if self._made is not None:
            self._made.close()
            self._made = None

    # -- machines --------------------------------------------------------------------------------
    def _filters(self) -> dict[str, list[str]]:
        marks = {"valohai-deployment": self._deployment, "valohai-group": self._group}
        return {"label": [f"{key}={value}" for key, value in marks.items()]}

    def _machine(self, summary: Mapping[str, Any]) -> Machine | None:
        """None for one that was removed meanwhile, or that ended some time ago and is removed now."""
        name = str(next(iter(summary["Names"] or ()), summary["Id"])).lstrip("/")
        labels: Mapping[str, str] = summary["Labels"]
        state = _STATES.get(summary["State"]) or self._ended(name)
        if state is None:
            return None
        return Machine(
            id=name,
            zone=labels.get(ZONE_LABEL, ""),
            purchase=Purchase(labels.get(PURCHASE_LABEL, Purchase.on_demand.value)),
            state=state,
            created_at=datetime.fromtimestamp(summary["Created"], timezone.utc),
            token=labels.get(LAUNCH_LABEL),
            bootstrap=labels.get(BOOTSTRAP_LABEL),
        )

    def _ended(self, name: str) -> MachineState | None:
        container = self._container(name)
        if container is None:
            return None
        if container.attrs["HostConfig"]["RestartPolicy"]["Name"] == _STOPPED_BY_US:
            return MachineState.stopped
        if self._clock() - _moment(container.attrs["State"]["FinishedAt"]) > REST_KEPT:
            _remove(container)
            return None
        return MachineState.gone

    def _launch(self, name: str, launch: Launch) -> None:
        """A name exists once on a daemon, so that a repeated launch finds what the first one made."""
        from docker.errors import APIError

        container = self._container(name) or self._create(name, launch)
        if container.status == "created":
            try:
                if launch.user_data:
                    container.put_archive("/", _script(launch.user_data, container))
                container.start()
            except APIError:
                _remove(container)  # else it would look like a machine that is on its way
                raise
            log.info("machine %s launched", name, extra={"action": "launch", "group": self._group})

    def _create(self, name: str, launch: Launch) -> Any:
        from docker.errors import APIError, ImageNotFound

        options = self._options(name, launch)
        try:
            return self._client.containers.create(**options)
        except ImageNotFound:
            self._pull()
            return self._client.containers.create(**options)
        except APIError as error:
            container = self._container(name) if error.status_code == 409 else None
            if container is None:
                raise
            return container

    def _pull(self) -> None:
        """Surely no machine was made where this fails, whatever the registry or the way to it has said."""
        from docker.errors import APIError

        image = self._settings.image
        try:
            self._client.images.pull(image)
        except APIError as error:
            raise CloudError(
                f"The Docker daemon at {self._host} has no image {image!r} and could not pull it for the group "
                f"{self._group!r}: {_words(error)}. Correct `image`, or make it there.",
                code="CannotPull",
                trouble=Trouble.invalid,
            ) from error

    def _options(self, name: str, launch: Launch) -> dict[str, Any]:
        settings = self._settings
        options: dict[str, Any] = {
            "image": settings.image,
            "name": name,
            "hostname": name,
            "init": True,
            "labels": {
                **settings.tags,
                **identity_tags(self._deployment, self._group, launch),
                ZONE_LABEL: launch.zone,
                PURCHASE_LABEL: launch.purchase.value,
            },
            "environment": {"VALOHAI_AGENT_MACHINE_ID": name},
            "extra_hosts": {HOST_ALIAS: "host-gateway"},
        }
        if launch.user_data:
            options["command"] = command_of(launch.user_data)
        if settings.network:
            options["network"] = settings.network
        if settings.cpus:
            options["nano_cpus"] = round(settings.cpus * 1e9)
        if settings.memory_gb:
            options["mem_limit"] = round(settings.memory_gb * 1e9)
        if settings.gpus:
            from docker.types import DeviceRequest

            options["device_requests"] = [
                DeviceRequest(count=settings.gpus, capabilities=[["gpu"]])
            ]
        return options

    def _container(self, name: str) -> Any | None:
        from docker.errors import NotFound

        try:
            return self._client.containers.get(name)
        except NotFound:
            return None

    def _ours(self, machine_id: str) -> Any | None:
        """None when it is gone; refuses to touch what is not of the group."""
        container = self._container(machine_id)
        if container is None:
            return None
        marks = (container.labels.get("valohai-deployment"), container.labels.get("valohai-group"))
        if marks != (self._deployment, self._group):
            raise CloudError(
                f"The container {machine_id} is not of the group {self._group!r} of this deployment and was left alone.",
                code="NotOurs",
                trouble=Trouble.invalid,
            )
        return container

    def _here(self, machine_id: str) -> Any:
        container = self._ours(machine_id)
        if container is None:
            raise CloudError(
                f"There is no container {machine_id} on the Docker host any more.",
                code="NotFound",
                trouble=Trouble.invalid,
            )
        return container

    # -- the host --------------------------------------------------------------------------------
    @property
    def _host(self) -> str:
        return self._settings.docker_host or os.environ.get("DOCKER_HOST") or DEFAULT_HOST

    @property
    def _client(self) -> DockerClient:
        _probe(self._host)
        if self._made is None:
            self._made = _connect(self._host)
        return self._made

    def _look_at_image(self) -> None:
        from docker.errors import ImageNotFound

        image = self._settings.image
        with self._translated(f"find the image {image!r}"):
            try:
                self._client.images.get(image)
            except ImageNotFound:
                self._client.images.get_registry_data(image)

    def _look_at_network(self) -> None:
        if self._settings.network:
            with self._translated(f"find the network {self._settings.network!r}"):
                self._client.networks.get(self._settings.network)

    @contextmanager
    def _translated(
        self, doing: str, *, zone: str | None = None, purchase: Purchase | None = None
    ) -> Iterator[None]:
        from docker.errors import DockerException
        from requests.exceptions import RequestException

        try:
            yield
        except (DockerException, RequestException, OSError) as error:
            words = _words(error)
            code, trouble = classify(getattr(error, "status_code", None), f"{words} {error}")
            raise CloudError(
                f"The Docker daemon at {self._host} could not {doing} for the group {self._group!r}: {words}.{_advice(code, trouble)}",
                code=code,
                trouble=trouble,
                zone=zone,
                purchase=purchase,
            ) from error


def _probe(host: str) -> None:
    """Raises the plain reason for a local socket; the SDK wraps it several times and leaks a socket each time."""
    if host.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(host.removeprefix("unix://"))


def _connect(host: str) -> DockerClient:
    """Asks for the daemon's API version by a client of its own, since one that fails while it is made leaks its socket."""
    import docker
    from docker.constants import MINIMUM_DOCKER_API_VERSION

    options: dict[str, Any] = {
        "timeout": API_SECONDS,
        "environment": {**os.environ, "DOCKER_HOST": host},
        "use_ssh_client": host.startswith("ssh://"),
    }
    with closing(docker.from_env(version=MINIMUM_DOCKER_API_VERSION, **options)) as probe:
        version = probe.version(api_version=False)["ApiVersion"]
    return docker.from_env(version=version, **options)


def machine_name(deployment: str, group: str, token: str, number: int) -> str:
    """The same for the same launch, unlike all others, and short enough for a host name."""
    digest = hashlib.sha256("\0".join((deployment, group, token)).encode()).hexdigest()[:12]
    readable = re.sub(r"[^a-z0-9-]+", "-", group.lower()).strip("-")[:32]
    return f"valohai-{readable}-{digest}-{number}"


def command_of(user_data: str) -> Sequence[str]:
    """Runs it by the interpreter of its first line, `/bin/sh` without one. It is a file, as everybody on the host reads
    the arguments of processes."""
    first = user_data.partition("\n")[0]
    interpreter = shlex.split(first[2:]) if first.startswith("#!") else []
    return [*(interpreter or ["/bin/sh"]), f"/{USER_DATA}"]


def _script(user_data: str, container: Any) -> bytes:
    """The file, as a tar archive. Only root reads it, where the image runs as root."""
    content = user_data.encode()
    entry = tarfile.TarInfo(USER_DATA)
    entry.size = len(content)
    entry.mode = 0o755 if container.attrs["Config"].get("User") else 0o700
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()


def _lacking(settings: DockerGroupSettings, facts: Mapping[str, Any]) -> Iterator[str]:
    cores, memory = facts.get("NCPU", 0), facts.get("MemTotal", 0)
    if settings.cpus and settings.cpus > cores:
        yield f"cpus = {settings.cpus:g} is more than the {cores} cores of the Docker host; lower it."
    if settings.memory_gb and settings.memory_gb * 1e9 > memory:
        yield f"memory_gb = {settings.memory_gb:g} is more than the {memory / 1e9:.1f} GB of the Docker host; lower it."
    if settings.gpus and "nvidia" not in (facts.get("Runtimes") or {}):
        yield "gpus: the Docker host has no NVIDIA container toolkit; install it there, or set gpus = 0."


def _end(container: Any) -> None:
    """Kills it at once; `list` removes what is left."""
    from docker.errors import APIError

    if container.status == "created":
        _remove(container)
        return
    container.update(restart_policy={"Name": "no"})
    try:
        container.kill()
    except APIError as error:
        if error.status_code != 409:  # it does not run
            raise


def _remove(container: Any) -> None:
    from docker.errors import APIError, NotFound

    try:
        container.remove(force=True, v=True)
    except NotFound:
        pass
    except APIError as error:  # somebody else is at it
        if error.status_code != 409 or "already in progress" not in str(error):
            raise


def _moment(text: str) -> datetime:
    """Docker's RFC 3339 with nanoseconds, as older Pythons cannot read it."""
    return datetime.fromisoformat(text[:19] + "+00:00")


def _words(error: BaseException) -> str:
    """The daemon's own if it said any."""
    own = getattr(error, "explanation", None) or getattr(error, "strerror", None)
    text = own.decode() if isinstance(own, bytes) else own
    return str(text or error).strip().rstrip(".")


_ADVICE = {
    Trouble.outage: " Is it running, and does `docker info` answer for the user of the service?",
    Trouble.credentials: " Add the user of the service to the group `docker`, or check `docker_host` and its certificates.",
    Trouble.invalid: " Change the group's settings.",
    Trouble.capacity: " Free some on that host, or lower max_machines.",
}


def _advice(code: str, trouble: Trouble) -> str:
    """A daemon that has answered runs, whatever was away from it, such as a registry."""
    answered = trouble is Trouble.outage and code != "Unreachable"
    return "" if answered else _ADVICE.get(trouble, "")
