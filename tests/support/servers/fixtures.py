"""Fixtures of the object stores. Each server starts when the first test of a session (of an xdist worker) asks.

A test makes a bucket or container of its own; nothing else separates it from the tests before.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ports import free_port
from tests.support.servers.process import ServerProcess, installed


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """Endpoint URL of S3 and the rest of AWS by moto; takes every access key, checks no signature."""
    program = installed("venv/bin/moto_server")
    server, port = ServerProcess("moto"), free_port()
    server.run([program, "-H", "127.0.0.1", "-p", str(port)])
    server.wait(f"http://127.0.0.1:{port}/moto-api/")
    yield f"http://127.0.0.1:{port}"
    server.stop()
