"""The stores that the contract suite runs against; a new kind adds one factory here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from valohai_dagster.stores.base import Store
from valohai_dagster.stores.local import LocalStore

FACTORIES: dict[str, Callable[[Path], Store]] = {
    "local": lambda tmp: LocalStore("main", tmp / "store"),
}


@pytest.fixture(params=sorted(FACTORIES))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty, writable store."""
    return FACTORIES[request.param](tmp_path)
