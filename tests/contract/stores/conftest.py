"""The stores that the contract suite runs against; a new kind adds one factory here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.file_server import FileServer, serving
from tests.support.servers import s3_stores, stores
from valohai_dagster.settings_stores import HttpStoreSettings
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.http import HttpStore
from valohai_dagster.stores.local import LocalStore
from valohai_dagster.stores.registry import make_store

Ask = Callable[[str], Any]  # gives the fixture of that name

FACTORIES: dict[str, Callable[[Ask, Path], Store]] = {
    "local": lambda _ask, tmp: LocalStore("main", tmp / "store"),
    "gcs": lambda ask, _tmp: stores.gcs_store(ask("gcs_server")),
    "azure": lambda ask, _tmp: stores.azure_store(ask("azure_server")),
    "swift": lambda ask, _tmp: stores.swift_store(ask("swift_server")),
    "s3": lambda ask, _tmp: s3_stores.s3_store(ask("moto_server")),
    "s3-by-swift": lambda ask, _tmp: s3_stores.swift_s3_store(ask("swift_server")),
}

# What a server for tests does otherwise than the service that it stands for.
LIMITS: dict[tuple[str, str], str] = {
    ("s3", "signatures"): "elsewhere: moto checks no signature; `s3-by-swift` does",
    (
        "gcs",
        "signatures",
    ): "elsewhere: no emulator checks signatures; test_gcs.py compares them",
    (
        "gcs",
        "conditions",
    ): "elsewhere: this emulator ignores conditions of signed requests; test_gcs.py",
    (
        "swift",
        "races",
    ): "elsewhere: Swift looks before it writes, not at once; keys of uploads are random",
    ("s3-by-swift", "races"): "elsewhere: as Swift",
    ("azure", "backslashes"): "elsewhere: Azure takes them for slashes, so the store refuses them",
    ("s3", "newlines"): "elsewhere: moto knows no newlines in keys; `s3-by-swift` does",
}

WITHOUT_SERVERS = {"local"}


def _params(but: Collection[str] = ()) -> list[Any]:
    """One per kind; those that need a server are marked by it, as tests are that ask for its fixture by name."""
    return [
        pytest.param(kind, marks=() if kind in WITHOUT_SERVERS else pytest.mark.stores)
        for kind in sorted(FACTORIES)
        if kind not in but
    ]


@pytest.fixture(params=_params())
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty, writable store."""
    return FACTORIES[request.param](request.getfixturevalue, tmp_path)


@pytest.fixture(params=_params(but=WITHOUT_SERVERS))
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """The same of kinds that workers reach by HTTP."""
    return FACTORIES[request.param](request.getfixturevalue, tmp_path)


@pytest.fixture
def needs(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Skips the test where the server is known not to do a thing."""

    def check(feature: str) -> None:
        given = request.node.callspec.params
        if reason := LIMITS.get((given.get("store") or given["remote"], feature)):
            pytest.skip(reason)

    return check


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileServer]:
    with serving(tmp_path / "served") as server:
        yield server


Put = Callable[[str, bytes], Any]


@pytest.fixture(params=[*_params(), "http"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Put]:
    """A store that is only read, and how a file gets into it; also the kinds that nobody can write."""
    if request.param == "http":
        server: FileServer = request.getfixturevalue("files")
        return HttpStore("main", HttpStoreSettings(kind="http", base_url=server.url)), server.put
    writable = FACTORIES[request.param](request.getfixturevalue, tmp_path)
    return changed(writable, readonly=True), writable.put


def changed(store: Store, **options: Any) -> Store:
    """The same place by other settings."""
    if isinstance(store, LocalStore):
        return LocalStore(store.name, store.root, **options)
    section: Any = store._section  # pyright: ignore
    return make_store(store.name, section.model_copy(update=options))
