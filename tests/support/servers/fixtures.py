"""Fixtures of the object stores. Each server starts when the first test of a session (of an xdist worker) asks.

A test makes a bucket or container of its own; nothing else separates it from the tests before.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.servers import kinds

NAMES = ("moto_server", "gcs_server", "gcs_session_server", "azure_server", "swift_server")


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """Endpoint URL of S3 and the rest of AWS by moto; takes every access key, checks no signature."""
    with kinds.moto() as server:
        yield server


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[kinds.GcsServer]:
    """The emulator that is right about preconditions and pages of listings."""
    with kinds.fake_gcs() as server:
        yield server


@pytest.fixture(scope="session")
def gcs_session_server() -> Iterator[kinds.GcsServer]:
    """The emulator that is right about resumable sessions and checksums."""
    with kinds.gcp_emulator() as server:
        yield server


@pytest.fixture(scope="session")
def azure_server() -> Iterator[kinds.AzureServer]:
    """Checks signatures, expiry and permissions."""
    with kinds.azurite() as server:
        yield server


@pytest.fixture(scope="session")
def swift_server() -> Iterator[kinds.SwiftServer]:
    """Checks signatures and expiry, of temporary URLs and of S3 requests."""
    with kinds.swift() as server:
        yield server
