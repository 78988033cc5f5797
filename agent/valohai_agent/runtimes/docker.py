"""Runs commands in containers through the Docker API; Podman's socket works too (DOCKER_HOST)."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valohai_agent.errors import ImageError, RuntimeFailure, RuntimeUnavailable, StartError
from valohai_agent.protocol import Job, RegistryLogin
from valohai_agent.runtimes.base import OnOutput, PullProgress, RunSpec
from valohai_agent.runtimes.docker_options import container_options, plan_limits, split_options
from valohai_agent.runtimes.docker_running import DockerRunning
from valohai_agent.runtimes.pulling import LayerProgress, pull_error
from valohai_agent.runtimes.script import build_script
from valohai_agent.trees import first_unreadable, open_tree, remove_tree
from valohai_agent.workspace import Workspace

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

log = logging.getLogger(__name__)

EXECUTION_LABEL = "valohai.execution"
ATTEMPT_LABEL = "valohai.attempt"
WORKER_LABEL = "valohai.worker"
API_SECONDS = 60
DEFAULT_HOST = "unix:///var/run/docker.sock"
HOST_ALIAS = "host.docker.internal"
IMAGE_NOTE = "image"  # file in run/: an image known to be here, for clean-up as root


class DockerRuntime:
    """One container per execution, `--init`, no entrypoint, root unless told otherwise (CONTRACT 4.5)."""

    name = "docker"
    uses_images = True

    def __init__(self, client: DockerClient | None = None) -> None:
        self._given = client
        self._made: DockerClient | None = None
        self._lock = threading.Lock()
        self._facts: dict[str, Any] = {}
        self._gateways: dict[str, str] = {}

    @property
    def client(self) -> DockerClient:
        """The connection, made when first needed; raises RuntimeUnavailable."""
        if self._given is not None:
            return self._given
        with self._lock:
            if self._made is None:
                self._made = _connect()
            return self._made

    def available(self) -> str | None:
        try:
            self.client.ping()
        except RuntimeUnavailable as error:
            return str(error)
        except docker_errors() as error:
            return f"the Docker daemon does not answer: {_words(error)}"
        return None

    def valohai_dir(self, workspace: Workspace) -> str:
        return "/valohai"

    def refuse(self, job: Job) -> str | None:
        return None

    def notices(self, job: Job) -> list[str]:
        if job.mounts and not job.mounts_allowed:
            return ["mounts were ignored due to environment configuration."]
        return []

    # -- images ------------------------------------------------------------------------------------
    def pull(
        self,
        image: str,
        *,
        login: RegistryLogin | None = None,
        progress: PullProgress | None = None,
        force: bool = False,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Makes the image present; with `force` asks the registry again (K-21). Raises ImageError."""
        present = self._has(image)
        if present and not force:
            return
        try:
            refusal = self._pull(image, login, progress or (lambda *_: None), cancelled)
        except docker_errors() as error:
            words = pull_error(image, _words(error), login, present=present)
            raise ImageError(words) from error
        if refusal is not None:
            raise ImageError(pull_error(image, refusal, login, present=present))

    def _has(self, image: str) -> bool:
        from docker.errors import ImageNotFound, NotFound

        try:
            self.client.images.get(image)
        except (ImageNotFound, NotFound):
            return False
        except RuntimeFailure:
            raise
        except docker_errors() as error:
            raise ImageError(f"The image {image!r} cannot be looked up: {_words(error)}") from error
        return True

    def _pull(
        self,
        image: str,
        login: RegistryLogin | None,
        progress: PullProgress,
        cancelled: threading.Event | None,
    ) -> str | None:
        """The words with which the daemon gave up, None when the image is here."""
        from docker.utils import parse_repository_tag

        repository, tag = parse_repository_tag(image)
        auth = {"username": login.username, "password": login.password} if login else None
        seen = LayerProgress()
        last_told = 0.0
        for event in self.client.api.pull(
            repository, tag=tag or "latest", stream=True, decode=True, auth_config=auth
        ):
            if cancelled is not None and cancelled.is_set():
                raise ImageError(f"The pull of {image!r} was cancelled.")
            if "error" in event:
                return str(event["error"]).strip().rstrip(".")
            seen.note(event)
            told = seen.told()
            if told and time.monotonic() - last_told >= 1.0:
                last_told = time.monotonic()
                progress(*told)
        return None

    def clean(self) -> str:
        """Removes all images that no container uses (VH_CLEAN, K-22)."""
        try:
            answer = self.client.images.prune(filters={"dangling": False})
        except docker_errors() as error:
            return f"images could not be removed: {_words(error)}"
        removed = len(answer.get("ImagesDeleted") or [])
        return f"removed {removed} image layers, {answer.get('SpaceReclaimed') or 0} bytes"

    # -- running -----------------------------------------------------------------------------------
    def start(self, spec: RunSpec, on_output: OnOutput) -> DockerRunning:
        """Creates, attaches, then starts, so that no output is missed. Raises StartError."""
        workspace = spec.workspace
        script = build_script(spec.commands, fail_fast=spec.fail_fast)
        path = workspace.run / "command"
        path.write_text(script.text, encoding="utf-8", errors="surrogateescape")
        path.chmod(0o755)
        (workspace.run / IMAGE_NOTE).write_text(spec.image)
        if spec.respect_image_user:
            _let_anyone_write(workspace)
        container = None
        try:
            facts = self._host_facts()
            limits = plan_limits(spec.environment, int(facts.get("MemTotal") or 0))
            gpus = _has_gpus(facts)
            image = self._env(spec) if gpus else {}
            options = container_options(spec, limits, gpus=gpus, image=image)
            container = self._create(spec, script.argv("/valohai/.command"), options)
            running = DockerRunning(
                self.client,
                container,
                on_output,
                limits.memory,
                signal_group=not self._is_podman(),
                gpus=spec.gpus if gpus else "none",
            )
            running.start()
            return running
        except (*docker_errors(), ValueError) as error:
            if container is not None:
                _remove(container)
            raise StartError(
                f"The container cannot be started from {spec.image!r}: {_words(error)}."
            ) from error

    def _create(self, spec: RunSpec, command: list[str], options: dict[str, Any]) -> Container:
        """One request: the SDK's own `containers.create` would look at the new container at once."""
        workspace, client = spec.workspace, self.client
        own, host, ports = split_options(options)
        made = client.api.create_container(
            spec.image,
            command,
            name=f"valohai-{workspace.execution_id}-{workspace.attempt}",
            labels={
                EXECUTION_LABEL: workspace.execution_id,
                ATTEMPT_LABEL: str(workspace.attempt),
                WORKER_LABEL: workspace.worker,
            },
            ports=ports,
            host_config=client.api.create_host_config(**host),
            **own,
        )
        return client.containers.prepare_model({"Id": made["Id"]})

    def api_hosts(self, environment: Mapping[str, str]) -> tuple[str, str]:
        network = environment.get("VH_DOCKER_NETWORK", "").strip()
        if network == "host":
            return "127.0.0.1", "127.0.0.1"
        gateway = self._bindable_gateway(network or ("podman" if self._is_podman() else "bridge"))
        return (gateway, gateway) if gateway is not None else ("127.0.0.1", HOST_ALIAS)

    # -- clean-up ----------------------------------------------------------------------------------
    def remove_leftovers(self, execution_id: str, attempt: int | None = None) -> int:
        labels = [f"{EXECUTION_LABEL}={execution_id}"]
        if attempt is not None:
            labels.append(f"{ATTEMPT_LABEL}={attempt}")
        try:
            found = self.client.containers.list(all=True, filters={"label": labels})
        except docker_errors() as error:
            raise RuntimeFailure(f"Containers cannot be listed: {_words(error)}") from error
        for container in found:
            _remove(container)
        return len(found)

    def remove_tree(self, path: Path) -> None:
        """Removes a tree; what belongs to the container's root is removed by a container."""
        try:
            remove_tree(path)
        except PermissionError:
            self._as_root(path, 'rm -rf -- "$1"/* "$1"/.[!.]* "$1"/..?*')
            remove_tree(path)

    def make_readable(self, path: Path) -> None:
        """Opens a tree for reading; what belongs to the container's root is opened by a container."""
        with contextlib.suppress(PermissionError):
            open_tree(path)
        if first_unreadable(path) is not None:
            self._as_root(path, 'chmod -R a+rX -- "$1" && chown -R -h "$2" -- "$1"')

    def _as_root(self, path: Path, command: str) -> None:
        """Runs a shell command on a directory as the container's root, in the job's own image."""
        image = self._known_image(path)
        owner = f"{os.geteuid()}:{os.getegid()}"
        try:
            self.client.containers.run(
                image,
                ["-c", command, "sh", "/tree", owner],
                entrypoint="/bin/sh",
                user="0:0",
                network_mode="none",
                volumes={str(path): {"bind": "/tree", "mode": "rw"}},
                security_opt=["label=disable"],
                remove=True,
            )
        except docker_errors() as error:
            raise RuntimeFailure(
                f"{path} belongs to another user and a helper container in {image!r} could not "
                f"open it: {_words(error)}"
            ) from error

    def _known_image(self, path: Path) -> str:
        for parent in (path, *path.parents):
            note = parent / "run" / IMAGE_NOTE
            if note.is_file():
                return note.read_text().strip()
        images = [tag for image in self.client.images.list() for tag in image.tags]
        if not images:
            raise RuntimeFailure(f"{path} belongs to another user and no image is here to help.")
        return images[0]

    # -- facts -------------------------------------------------------------------------------------
    def _host_facts(self) -> dict[str, Any]:
        if not self._facts:
            self._facts = self.client.info()
        return self._facts

    def _env(self, spec: RunSpec) -> dict[str, str]:
        """Variables that the image itself defines."""
        config = self.client.images.get(spec.image).attrs.get("Config") or {}
        return dict(entry.split("=", 1) for entry in config.get("Env") or [] if "=" in entry)

    def _is_podman(self) -> bool:
        if "podman" not in self.__dict__:
            components = self.client.version().get("Components") or []
            self.__dict__["podman"] = any("Podman" in c.get("Name", "") for c in components)
        return self.__dict__["podman"]

    def _bindable_gateway(self, network: str) -> str | None:
        """The gateway if the agent can listen there. A network that was made anew is seen by that too."""
        known = self._gateways.get(network)
        if known is not None and _can_bind(known):
            return known
        found = self._gateway(network)
        if found is None or not _can_bind(found):
            return None
        self._gateways[network] = found
        return found

    def _gateway(self, network: str) -> str | None:
        try:
            config = self.client.networks.get(network).attrs["IPAM"]["Config"][0]
        except (*docker_errors(), KeyError, IndexError, TypeError):
            return None  # no such network, or a daemon that tells nothing about it
        return config.get("Gateway") or _first_host(config["Subnet"])


def _first_host(subnet: str) -> str:
    """The gateway that Docker takes when none is named."""
    return str(next(iter(ipaddress.ip_network(subnet).hosts())))


def docker_errors() -> tuple[type[Exception], ...]:
    """What docker-py lets through: its own errors, requests' and the socket's."""
    import requests
    from docker.errors import DockerException

    return DockerException, requests.RequestException, OSError


def _connect() -> DockerClient:
    try:
        import docker
    except ImportError as error:
        raise RuntimeUnavailable("the Python package `docker` is not installed") from error
    host = os.environ.get("DOCKER_HOST") or DEFAULT_HOST
    try:
        _probe(host)
        return docker.from_env(version="auto", timeout=API_SECONDS)
    except docker_errors() as error:
        raise RuntimeUnavailable(
            f"no Docker daemon at {host}: {_words(error)}. Start it, or set DOCKER_HOST, "
            "or add this user to the group `docker`"
        ) from error


def _probe(host: str) -> None:
    """Raises the plain reason for a local socket; the SDK's own is wrapped four times."""
    if host.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(host.removeprefix("unix://"))


def _remove(container: Any) -> None:
    try:
        container.remove(force=True, v=True)
    except docker_errors() as error:  # gone already, or being removed by another agent
        log.info("container %s: %s", container.short_id, error, extra={"action": "remove"})


def _words(error: BaseException) -> str:
    """The daemon's own explanation if there is one, without a trailing full stop."""
    explanation = getattr(error, "explanation", None)
    text = explanation.decode() if isinstance(explanation, bytes) else explanation
    return str(text or error).strip().rstrip(".")


def _has_gpus(facts: Mapping[str, Any]) -> bool:
    """Whether the daemon can hand over NVIDIA GPUs and the machine has one."""
    return "nvidia" in (facts.get("Runtimes") or {}) and Path("/dev/nvidiactl").exists()


def _let_anyone_write(workspace: Workspace) -> None:
    for directory, _, _ in os.walk(workspace.repository):
        Path(directory).chmod(0o777)
    workspace.outputs.chmod(0o777)


def _can_bind(host: str) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True
