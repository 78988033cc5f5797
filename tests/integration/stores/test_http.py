"""What is special about HTTP stores: reading only, versions of what servers say, credentials that stay with one server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support import web as scripted
from tests.support.file_server import FileServer, serving
from tests.support.parted import request
from tests.support.ports import free_port
from valohai_dagster.errors import StoreError, StoreNotWritable, StoreUnavailable
from valohai_dagster.settings_stores import HttpStoreSettings
from valohai_dagster.stores.http import HttpStore

HOUR = timedelta(hours=1)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileServer]:
    with serving(tmp_path / "served") as server:
        yield server


def http_store(url: str, **options: Any) -> HttpStore:
    return HttpStore("x", HttpStoreSettings(kind="http", base_url=url, **options))


def test_a_listing_is_refused_with_what_to_do(files: FileServer) -> None:
    with pytest.raises(StoreError, match="HTTP has no listings; name the files one by one"):
        http_store(files.url).list("sets/")


def test_nothing_can_be_written(files: FileServer) -> None:
    with pytest.raises(StoreNotWritable, match="for reading only; choose another store"):
        http_store(files.url).put("a", b"")


def test_a_server_that_refuses_head_is_asked_for_a_byte(files: FileServer) -> None:
    store = http_store(files.url)
    files.put("a", b"content")
    files.put("empty", b"")
    expected = store.stat("a")
    files.refuses_head = True
    files.seen.clear()
    assert store.stat("a") == expected
    assert [seen.get("Range") for seen in files.seen] == ["bytes=0-0"]
    empty = store.stat("empty")
    assert empty is not None
    assert empty.size == 0
    assert store.stat("missing") is None


def test_without_an_etag_time_and_size_are_the_version(files: FileServer) -> None:
    store = http_store(files.url)
    files.put("a", b"content")
    by_tag = store.stat("a")
    files.says_etag = False
    by_time = store.stat("a")
    assert by_tag is not None
    assert by_time is not None
    assert by_time.version == f"7-{int(by_time.mtime.timestamp())}"
    assert by_time.version != by_tag.version


def test_weak_etags_are_no_versions_where_there_is_a_time() -> None:
    """A weak one says that two contents mean the same, not that they are the same."""
    with scripted.serve() as server:
        time = {"Last-Modified": "Sun, 22 Nov 2026 10:00:00 GMT"}
        server.answers["/a"] = [scripted.content(b"12", ETag='W/"1"', **time)]
        server.answers["/b"] = [scripted.content(b"12", ETag='W/"1"')]
        server.answers["/c"] = [scripted.content(b"12")]
        store = http_store(server.url(""))
        versions = [found.version for key in "abc" if (found := store.stat(key))]
    assert versions == ["2-1795341600", 'W/"1"', "2"]


def test_a_server_that_hides_the_size_is_told() -> None:
    def endless(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True

    with scripted.serve() as server:
        server.answers["/a"] = [endless]
        with pytest.raises(StoreUnavailable, match="does not say how large it is"):
            http_store(server.url("")).stat("a")


def test_credentials_go_with_every_request_and_into_grants(tmp_path: Path) -> None:
    with serving(tmp_path, login=("me", "pass:word")) as server:
        server.put("a", b"content")
        store = http_store(server.url, username="me", password="pass:word")
        assert store.stat("a") is not None
        with store.open("a") as file:
            assert file.read() == b"content"
        assert request(store.sign_get("a", expires=HOUR)).content == b"content"
        assert "pass:word" not in repr(store)
        with pytest.raises(StoreUnavailable, match=r"check the credentials in \[stores\.x\]"):
            http_store(server.url, username="me", password="wrong").stat("a")


def test_credentials_are_taken_to_no_other_server(tmp_path: Path) -> None:
    with serving(tmp_path / "one") as first, serving(tmp_path / "two") as second:
        second.put("b", b"content")
        first.redirects["a"] = f"{second.url}/b"
        store = http_store(first.url, username="me", password="pw", headers={"X-Token": "t"})
        with store.open("a") as file:
            assert file.read() == b"content"
        assert store.stat("a") is not None
    for seen in first.seen:
        assert (seen["Authorization"][:6], seen["X-Token"]) == ("Basic ", "t")
    for seen in second.seen:
        assert not {"Authorization", "X-Token"} & set(seen)


def test_i02_its_uris_are_plain_addresses(files: FileServer) -> None:
    store = http_store(files.url)
    assert store.uri("a b/ü.txt") == f"{files.url}/a%20b/%C3%BC.txt"
    assert store.key_of(f"{files.url}/a%20b/%C3%BC.txt") == "a b/ü.txt"
    assert store.key_of(f"{files.url}/a?version=2") is None
    assert store.key_of(files.url.replace("http", "https") + "/a") is None


def test_a_broken_connection_is_taken_up_where_it_broke() -> None:
    data = bytes(range(256)) * 16_384
    with scripted.serve() as server:
        server.answers["/a"] = [
            scripted.broken(data, 3_000_000, ETag='"1"'),
            scripted.content(data, ETag='"1"'),
        ]
        with http_store(server.url("")).open("a") as file:
            assert file.read() == data
        assert "Range" in server.requests[-1][2]


def test_a_server_that_is_away_is_told() -> None:
    with pytest.raises(StoreUnavailable, match="check the address"):
        http_store(f"http://127.0.0.1:{free_port()}").stat("a")
