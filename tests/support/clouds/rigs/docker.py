"""The real Docker daemon of this machine. Between it and the driver is a relay that can answer in its place."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import shutil
import socket
import socketserver
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from tests.support import demand
from tests.support.clouds.rig import DEPLOYMENT, GROUP, Rig
from tests.support.podman import busybox_root
from valohai_dagster.capacity.clouds.base import Driver, Trouble
from valohai_dagster.capacity.clouds.docker import USER_DATA, DockerDriver
from valohai_dagster.capacity.model import Purchase
from valohai_dagster.settings_groups import DockerGroupSettings

if TYPE_CHECKING:
    from docker import DockerClient

NEED = "docker"
IMAGE = "valohai-dagster-test-machine:1"
NETWORK = "valohai-dagster-test-machines"
SUBNET = "10.213.77.0/29"  # room for five machines
ADDRESSES = 5
_SOCKET = "/var/run/docker.sock"
# As a machine does, it runs its user data and then stays.
_ENTRYPOINT = json.dumps(["/bin/sh", "-c", '"$@"; exec sleep 3600', "machine"])

# What the daemon and those behind it answer to all calls.
_ANSWERS = {
    Trouble.throttled: (429, "toomanyrequests: You have reached your pull rate limit"),
    Trouble.credentials: (403, "authorization denied by plugin policy: not for you"),
}


class Relay:
    """A socket beside the daemon's own; answers in the daemon's place while told to."""

    def __init__(self, path: Path) -> None:
        self.url = f"unix://{path}"
        self._path = path
        self._answer: bytes | None = None
        self._open: set[socket.socket] = set()
        self._server: socketserver.ThreadingUnixStreamServer | None = None

    def serve(self) -> None:
        relay = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                relay._talk(self.request)

        self._path.unlink(missing_ok=True)
        self._server = socketserver.ThreadingUnixStreamServer(str(self._path), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,)).start()

    def close(self) -> None:
        """As a daemon that has stopped."""
        assert self._server is not None
        self._path.unlink(missing_ok=True)
        self._server.shutdown()
        self._hang_up()
        self._server.server_close()

    @contextmanager
    def down(self) -> Iterator[None]:
        self.close()
        try:
            yield
        finally:
            self.serve()

    @contextmanager
    def answering(self, status: int, message: str) -> Iterator[None]:
        body = json.dumps({"message": message}).encode()
        head = f"HTTP/1.1 {status} No\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self._answer = head.encode() + body
        self._hang_up()
        try:
            yield
        finally:
            self._answer = None

    def _hang_up(self) -> None:
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _talk(self, client: socket.socket) -> None:
        if self._answer is not None:
            client.recv(65536)
            client.sendall(self._answer)
            return
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.connect(_SOCKET)
            self._open |= {client, daemon}
            back = threading.Thread(target=_pump, args=(daemon, client))
            back.start()
            _pump(client, daemon)
            back.join()
            self._open -= {client, daemon}


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


class DockerRig(Rig):
    """All containers on the network of the tests."""

    kind: ClassVar[str] = "docker"
    limits: ClassVar[Mapping[str, str]] = {
        "zones": "a Docker host has no zones",
        "spot": "containers are not sold",
        "lag": "the daemon lists what it has",
        "quota": "a Docker host has no quotas",
        "protected": "nobody else scales containers",
    }

    def __init__(self, client: DockerClient, relay: Relay) -> None:
        self._client, self._relay = client, relay
        self._drivers: list[Driver] = []

    def driver(self, *, group: str = GROUP, **changes: Any) -> Driver:
        values: dict[str, Any] = {
            "kind": "docker",
            "image": IMAGE,
            "network": NETWORK,
            "docker_host": self._relay.url,
        }
        settings = DockerGroupSettings.model_validate({**values, **changes})
        self._drivers.append(DockerDriver(group, settings, deployment=DEPLOYMENT))
        return self._drivers[-1]

    def foreign(self) -> str:
        return str(self._run("valohai-dagster-test-foreign").name)

    def alive(self, machine_id: str) -> bool:
        for one in self._client.containers.list(all=True, filters={"name": f"^/?{machine_id}$"}):
            kept = one.attrs["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
            return one.status == "running" or kept
        return False

    def tags(self, machine_id: str) -> Mapping[str, str]:
        return self._client.containers.get(machine_id).labels

    def user_data(self, machine_id: str) -> str:
        """And that nobody else reads it."""
        parts, _ = self._client.containers.get(machine_id).get_archive(f"/{USER_DATA}")
        with tarfile.open(fileobj=io.BytesIO(b"".join(parts))) as archive:
            (entry,) = archive.getmembers()
            assert (entry.uid, entry.mode & 0o077) == (0, 0)
            content = archive.extractfile(entry)
            assert content is not None
            return content.read().decode()

    def vanish(self, machine_id: str) -> None:
        self._client.containers.get(machine_id).remove(force=True)

    def refuse(
        self,
        trouble: Trouble,
        *,
        zone: str | None = None,
        purchase: Purchase | None = None,
        room: int = 0,
    ) -> AbstractContextManager[None]:
        if trouble is Trouble.capacity:
            return self._without_addresses(room)
        if trouble is Trouble.invalid:
            return self._without_network()
        if trouble is Trouble.outage:
            return self._relay.down()
        if trouble is Trouble.quota:
            self.cannot("quota")
        return self._relay.answering(*_ANSWERS[trouble])

    def wrong_settings(self) -> Mapping[str, Mapping[str, Any]]:
        return {
            "cpus": {"cpus": 4096},
            "memory_gb": {"memory_gb": 1e6},
            "gpus": {"gpus": 8},
            "no-such-network": {"network": "no-such-network"},
            "no-such-image": {"image": "127.0.0.1:9/no-such-image"},
            "nowhere.sock": {"docker_host": "unix:///tmp/nowhere.sock"},
        }

    def clear(self) -> None:
        for driver in self._drivers:
            driver.close()
        for one in self._client.containers.list(all=True, filters={"network": NETWORK}):
            one.remove(force=True)

    def _run(self, name: str) -> Any:
        return self._client.containers.run(IMAGE, ["true"], name=name, network=NETWORK, detach=True)

    @contextmanager
    def _without_addresses(self, room: int) -> Iterator[None]:
        others = [self._run(f"valohai-dagster-test-other-{n}") for n in range(ADDRESSES - room)]
        try:
            yield
        finally:
            for one in others:
                one.remove(force=True)

    @contextmanager
    def _without_network(self) -> Iterator[None]:
        self._client.networks.get(NETWORK).remove()
        try:
            yield
        finally:
            _make_network(self._client)


@contextmanager
def serving() -> Iterator[tuple[DockerClient, Relay]]:
    import docker.errors

    if not shutil.which("busybox"):
        pytest.skip("elsewhere: busybox is not installed")
    with ExitStack() as stack:
        try:
            client = docker.DockerClient(base_url=f"unix://{_SOCKET}", timeout=60)
            stack.callback(client.close)
            client.ping()
        except docker.errors.DockerException as error:
            demand.missing("docker", f"no daemon answers: {error}")
        changes = [f"ENTRYPOINT {_ENTRYPOINT}", 'CMD ["true"]']
        client.api.import_image_from_data(busybox_root(), *IMAGE.split(":"), changes=changes)
        stack.callback(_remove_network, client)
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp"))
        relay = Relay(Path(directory) / "relay.sock")
        relay.serve()
        stack.callback(relay.close)
        yield client, relay


@contextmanager
def opened(server: tuple[DockerClient, Relay], tmp_path: Path) -> Iterator[DockerRig]:
    rig = DockerRig(*server)
    with _alone():
        rig.clear()
        _make_network(server[0])
        yield rig
        rig.clear()


@contextmanager
def _alone() -> Iterator[None]:
    """Names of containers follow from launches, so that two processes of tests would take each other's."""
    path = Path(tempfile.gettempdir()) / "valohai-dagster-test-machines.lock"
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_network(client: DockerClient) -> None:
    from docker.types import IPAMConfig, IPAMPool

    if not client.networks.list(names=[NETWORK]):
        pool = IPAMConfig(pool_configs=[IPAMPool(subnet=SUBNET)])
        client.networks.create(NETWORK, driver="bridge", ipam=pool)


def _remove_network(client: DockerClient) -> None:
    with _alone():
        for network in client.networks.list(names=[NETWORK]):
            network.remove()
