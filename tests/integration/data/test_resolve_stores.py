"""Inputs and adoption over stores behind a network: whose bucket it is decides, wildcards, versions, what is down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.data.conftest import NOW, Place
from tests.support.file_server import serving
from tests.support.ports import free_port
from tests.support.servers.s3_stores import s3_store
from tests.support.servers.stores import azure_store, gcs_store, swift_store
from valohai_dagster.data.adoption import NOT_FOUND, adopt, find_candidates, read_checksums
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.resolve import Source
from valohai_dagster.data.transfers import Mover, fetch_datum
from valohai_dagster.errors import ResolutionError
from valohai_dagster.settings_stores import HttpStoreSettings, S3StoreSettings
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.registry import Stores, make_store

MAKE: dict[str, tuple[str, Callable[..., Store]]] = {
    "s3": ("moto_server", s3_store),
    "gs": ("gcs_server", gcs_store),
    "azure": ("azure_server", azure_store),
    "swift": ("swift_server", swift_store),
}
KEYS = ("sets/a.txt", "sets/deep/b.txt", "sets/c.png", "other.txt")


@pytest.fixture(params=list(MAKE))
def remote(request: pytest.FixtureRequest, place: Place) -> Store:
    fixture, make = MAKE[request.param]
    store = make(request.getfixturevalue(fixture))
    assert store.uri("").startswith(f"{request.param}://")
    for key in KEYS:
        store.put(key, key.encode())
    place.stores = Stores({"local": place.stores["local"], "main": store}, default="local")
    return store


def wanted(*uris: str, **changes: object) -> InputSpec:
    return InputSpec(name="data", uris=list(uris), **changes)  # type: ignore[arg-type]


def test_i01_i03_objects_are_found_in_the_bucket_that_the_uri_names(
    place: Place, remote: Store
) -> None:
    (item,) = place.resolve(
        wanted(remote.uri("sets/**.txt"), remote.uri("other.txt"), keep_directories="suffix")
    ).inputs
    assert [file.name for file in item.files] == ["a.txt", "deep/b.txt", "other.txt"]
    assert [file.uri for file in item.files] == [
        remote.uri(key) for key in ("sets/a.txt", "sets/deep/b.txt", "other.txt")
    ]
    for file, key in zip(item.files, ("sets/a.txt", "sets/deep/b.txt", "other.txt"), strict=True):
        stat = remote.stat(key)
        assert stat is not None
        assert (file.size, file.cache_key) == (len(key), f"{file.uri}@{stat.version}")


def test_i38_what_is_not_there_is_refused(place: Place, remote: Store) -> None:
    with pytest.raises(ResolutionError) as caught:
        place.resolve(wanted(remote.uri("nothing"), remote.uri("nothing/*")))
    assert "there is no such file in the store 'main'" in caught.value.problems[0]
    with pytest.raises(ResolutionError, match="no file matches"):
        place.resolve(wanted(remote.uri("nothing/*")))


def test_i40_objects_become_datums_and_come_back(
    place: Place, remote: Store, tmp_path: Path
) -> None:
    candidates, missing = find_candidates(
        [remote.uri("sets/**"), remote.uri("nothing")], place.stores
    )
    assert [(one.url, one.code) for one in missing] == [(remote.uri("nothing"), NOT_FOUND)]
    made = adopt(place.records, candidates, project_id="p1", checksums_of=read_checksums, now=NOW)
    assert {datum.name for datum in made.created.values()} == {"a.txt", "deep/b.txt", "c.png"}
    datum = made.created[remote.uri("sets/deep/b.txt")]
    with Mover() as mover:
        fetch_datum(datum, tmp_path / "b", stores=place.stores, mover=mover)
    assert (tmp_path / "b").read_text() == "sets/deep/b.txt"
    (file,) = place.resolve(wanted(datum.uri)).inputs[0].files
    assert file.cache_key == f"sha256:{datum.sha256}"
    again = adopt(place.records, candidates, project_id="p1", now=NOW)
    assert again.created == {}
    assert again.existing.keys() == made.created.keys()


def test_i02_an_address_below_the_base_of_an_http_store_gets_its_credentials(
    place: Place, tmp_path: Path
) -> None:
    with serving(tmp_path / "files", login=("me", "hunter2")) as server:
        server.put("sets/a.txt", b"12345")
        values = {"base_url": server.url, "username": "me", "password": "hunter2"}
        store = make_store("web", HttpStoreSettings(kind="http", **values))  # type: ignore[arg-type]
        place.stores = Stores({"local": place.stores["local"], "web": store}, default="local")
        url = f"{server.url}/sets/a.txt"
        resolved = place.resolve(wanted(url))
        (file,) = resolved.inputs[0].files
        assert (file.name, file.uri, file.size) == ("a.txt", url, 5)
        assert resolved.sources == {file.id: Source(store="web", key="sets/a.txt")}
        own = url.replace("http://", "http://other:secret@")
        (file,) = place.resolve(wanted(own)).inputs[0].files
        assert file.size is None, "credentials in the address are for that request alone"
        with pytest.raises(ResolutionError, match="cannot be searched"):
            place.resolve(wanted(f"{server.url}/sets/"))
        with pytest.raises(ResolutionError, match="there is no such file in the store 'web'"):
            place.resolve(wanted(f"{server.url}/none"))


def test_i38_a_store_that_is_down_is_told_with_its_message(place: Place) -> None:
    section = S3StoreSettings(
        kind="s3",
        bucket="b",
        endpoint_url=f"http://127.0.0.1:{free_port()}",
        region="us-east-1",
        access_key_id="x",
        secret_access_key="hunter2",  # type: ignore[arg-type]
        connect_timeout_seconds=1,
    )
    place.stores = Stores({"far": make_store("far", section)}, default="far")
    with pytest.raises(ResolutionError) as caught:
        place.resolve(wanted("s3://b/sets/*"), InputSpec(name="more", uris=["s3://b/sets/*"]))
    assert len(caught.value.problems) == 2
    assert all("'far'" in problem for problem in caught.value.problems)
    assert "hunter2" not in str(caught.value)
