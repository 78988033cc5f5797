"""A secret that an execution gets is readable nowhere but in its command's own environment.

The whole product runs: Dagster, a conductor process, an agent process with Docker, a private registry, an object store,
a web server with a password. While the command runs and after it has ended, everything that any part has written or
sent is searched for every secret: each Redis key, what goes over Redis' wire, its dump and append-only file, logs,
records, Dagster's storage, process lists, the container's description.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import demand
from tests.support.deployment import Deployment
from tests.support.file_server import FileServer, serving
from tests.support.ports import wait_for
from tests.support.projects import step_yaml, write_project
from tests.support.redis_server import RedisServer
from tests.support.registry import Registry, missing_programs
from tests.support.remote_stores import section_of, toml_of
from tests.support.servers.s3_stores import s3_store
from valohai_dagster.data.secrets import load_secret_key, set_variable
from valohai_dagster.executions.stream import ExecutionStatus
from valohai_dagster.records.engine import open_records

if TYPE_CHECKING:
    from docker import DockerClient

VARIABLE = "vs-variable-7f3a9c51d2"
URL_PASSWORD = "vs-url-password-55e1b0"
URL_TOKEN = "vs-url-token-9b8d21"  # under a name that nobody would take for a credential
STORE_KEY = "vs-store-key-c2d4e6f8"
SIGNATURE = "X-Amz-Signature="  # of a signed URL
PROOF = hashlib.sha256(VARIABLE.encode()).hexdigest()

COMMAND = """
trap 'echo bye; exit 0' INT TERM
echo "{\\"proof\\": \\"$(printf %s "$TOKEN" | sha256sum | cut -d' ' -f1)\\"}"
echo result > /valohai/outputs/result.txt
while true; do sleep 0.2; done
"""


class Wire:
    """All commands that a Redis server gets, as it tells them to a monitor."""

    def __init__(self, server: RedisServer) -> None:
        self.heard = bytearray()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(server.socket))
        self._socket.sendall(b"MONITOR\r\n")
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while piece := self._socket.recv(1 << 16):
            self.heard += piece

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()


def values_in(server: RedisServer) -> Iterator[tuple[str, bytes]]:
    """Every key with all that it holds, uncompressed."""
    readers: dict[bytes, Any] = {
        b"string": lambda c, k: c.get(k),
        b"hash": lambda c, k: c.hgetall(k),
        b"list": lambda c, k: c.lrange(k, 0, -1),
        b"set": lambda c, k: c.smembers(k),
        b"zset": lambda c, k: c.zrange(k, 0, -1, withscores=True),
        b"stream": lambda c, k: c.xrange(k),
    }
    with server.client() as client:
        for key in client.scan_iter():
            kind: Any = client.type(key)
            if kind != b"none":  # it may have ended meanwhile
                yield f"redis:{key!r}", repr((key, readers[kind](client, key))).encode()


def files_below(*roots: Path) -> Iterator[tuple[str, bytes]]:
    """But for what people have written themselves: the settings, and the project's valohai.yaml."""
    own = ("valohai.toml", "valohai.yaml")
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink() and path.name not in own:
                try:
                    yield str(path), path.read_bytes()
                except FileNotFoundError:
                    continue


def processes() -> Iterator[tuple[str, bytes]]:
    """Command lines of all, environments of all but the command's own processes."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        yield f"{entry}/cmdline", command
        if b"VH_JOB_ID=" not in environment:
            yield f"{entry}/environ", environment


def containers(client: DockerClient, image: str) -> Iterator[tuple[str, bytes]]:
    """What Docker tells of the command's container, but for its environment."""
    for container in client.containers.list(all=True, filters={"ancestor": image}):
        told = dict(container.attrs)
        told["Config"] = {k: v for k, v in told["Config"].items() if k != "Env"}
        yield f"container:{container.name}", json.dumps(told).encode()


def spellings(secret: str) -> list[bytes]:
    return [
        secret.encode(),
        urllib.parse.quote(secret, safe="").encode(),
        base64.b64encode(secret.encode()).rstrip(b"="),
        secret.encode().hex().encode(),
    ]


@pytest.fixture
def registry(docker_client: DockerClient, tmp_path: Path) -> Iterator[Registry]:
    if missing := missing_programs():
        demand.missing("docker", f"not on PATH: {', '.join(missing)}")
    registry = Registry(tmp_path / "registry")
    yield registry
    registry.stop()


@pytest.fixture
def image(registry: Registry, docker_client: DockerClient) -> Iterator[str]:
    name = registry.push(docker_client, "team/secret:1")
    yield name
    for found in docker_client.images.list(name):
        docker_client.images.remove(found.id, force=True)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileServer]:
    with serving(tmp_path / "web", login=("reader", URL_PASSWORD)) as files:
        files.put("data.csv", b"1,2,3")
        yield files


@pytest.fixture
def deployment(
    own_redis: RedisServer,
    registry: Registry,
    image: str,
    moto_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Deployment]:
    store = s3_store(moto_server, secret_key=STORE_KEY)
    toml = f"""
    redis_url = "{own_redis.unix_url}"
    http_port = 0
    default_group = "far"
    default_store = "far"
    [groups.far]
    kind = "static"
    [registries.ours]
    match = "{registry.address}/team/*"
    username = "{registry.username}"
    password = "{registry.password}"
    """
    with Deployment(tmp_path / "place", toml + toml_of("far", section_of(store))) as made:
        monkeypatch.setenv("VALOHAI_CONFIG", str(made.config))
        monkeypatch.delenv("VALOHAI_STATE")
        yield made


def give_secret(deployment: Deployment) -> None:
    settings = deployment.settings
    records = open_records(settings)
    with records.write() as conn:
        key, now = load_secret_key(settings), datetime.now(timezone.utc)
        set_variable(conn, key, group="tokens", name="TOKEN", value=VARIABLE, now=now)
    records.close()


def materialize(project: Path, home: Path) -> Future[Any]:
    """Runs the step as an asset of Dagster, in the background, with its storage in `home`."""
    import dagster as dg

    from valohai_dagster.plugin.assets import project_assets
    from valohai_dagster.projects.project import load_project

    def run() -> Any:
        assets = project_assets(load_project(project, cache_dir=home / "projects"))
        with dg.DagsterInstance.local_temp(str(home)) as instance:
            return dg.materialize(assets, instance=instance, raise_on_error=False)

    home.mkdir()
    pool = ThreadPoolExecutor(1)
    future = pool.submit(run)
    pool.shutdown(wait=False)
    return future


def test_a_secret_is_readable_nowhere_but_in_its_commands_environment(
    deployment: Deployment,
    registry: Registry,
    image: str,
    files: FileServer,
    own_redis: RedisServer,
    docker_client: DockerClient,
    tmp_path: Path,
) -> None:
    with own_redis.client() as client:
        client.config_set("rdbcompression", "no")
    wire = Wire(own_redis)
    give_secret(deployment)
    url = files.url.replace("http://", f"http://reader:{URL_PASSWORD}@")
    url += f"/data.csv?page={URL_TOKEN}"
    extra = "environment-variable-groups: [tokens]\n"
    extra += f"inputs:\n  - name: data\n    default: {url}\n"
    project = write_project(tmp_path / "project", step_yaml(COMMAND, image=image, extra=extra))
    deployment.start_conductor()
    deployment.start_agent("far", own_redis.unix_url, "--runtime", "docker")
    home = tmp_path / "dagster"
    run = materialize(project, home)
    settings = deployment.settings
    records = open_records(settings)

    def begun() -> tuple[str, dict[str, Any]] | None:
        import sqlalchemy as sa

        from valohai_dagster.records import tables as t

        with records.read() as conn:
            query = sa.select(t.executions.c.id, t.executions.c.cumulative_metadata)
            row = conn.execute(query).first()
        assert not run.done(), run.result()
        return (row[0], row[1]) if row is not None and row[1] else None

    def search(when: str) -> None:
        with own_redis.client() as client:
            client.save()
        found: list[str] = []
        secrets = [VARIABLE, URL_PASSWORD, URL_TOKEN, STORE_KEY, registry.password, SIGNATURE]
        needles = [(secret, spelling) for secret in secrets for spelling in spellings(secret)]
        places = [
            *values_in(own_redis),
            ("redis' wire", bytes(wire.heard)),
            *files_below(own_redis.directory, deployment.root, home),
            *processes(),
            *containers(docker_client, image),
        ]
        for place, content in places:
            found += [f"{secret} in {place}" for secret, needle in needles if needle in content]
        assert not found, f"{when}: {found}"
        names = " ".join(place for place, _ in places)
        for expected in ("dump.rdb", "appendonly", "records.db", "far", "redis:", "runs.db"):
            assert expected in names, f"{when}: nothing of {expected} was searched: {names}"

    try:
        found = wait_for(begun, seconds=90, what="the command")
        assert found is not None
        execution_id, metadata = found
        assert metadata["proof"] == PROOF
        assert list(containers(docker_client, image))
        search("while it runs")
        deployment.client().stop(execution_id, reason="enough")
        run.result(60)
        view = deployment.client().view(execution_id)
        assert view is not None
        assert view.status is ExecutionStatus.stopped
        assert [output.name for output in view.outputs] == ["result.txt"]
        search("after it has ended")
    finally:
        records.close()
        wire.close()
