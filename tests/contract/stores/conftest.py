"""The stores that the contract suite runs against; a new kind adds one factory here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import stores
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.local import LocalStore

Ask = Callable[[str], Any]  # gives the fixture of that name

FACTORIES: dict[str, Callable[[Ask, Path], Store]] = {
    "local": lambda _ask, tmp: LocalStore("main", tmp / "store"),
    "gcs": lambda ask, _tmp: stores.gcs_store(ask("gcs_server")),
    "azure": lambda ask, _tmp: stores.azure_store(ask("azure_server")),
    "swift": lambda ask, _tmp: stores.swift_store(ask("swift_server")),
}


WITHOUT_SERVERS = {"local"}


def _params() -> list[Any]:
    """One per kind; those that need a server are marked by it, as tests are that ask for its fixture by name."""
    return [
        pytest.param(kind, marks=() if kind in WITHOUT_SERVERS else pytest.mark.stores)
        for kind in sorted(FACTORIES)
    ]


@pytest.fixture(params=_params())
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty, writable store."""
    return FACTORIES[request.param](request.getfixturevalue, tmp_path)
