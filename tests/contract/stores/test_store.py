"""What every store does, whatever its kind."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest

from valohai_dagster.errors import StoreBadKey, StoreConflict, StoreMissing
from valohai_dagster.stores.base import Store

HOUR = timedelta(hours=1)
ODD_KEYS = [
    "a b",
    "ä/日本.txt",
    "-rf",
    "line\nbreak",
    "100%25",
    "a?b#c",
    "...",
    "q'\"q",
    "back\\slash",
]
BAD_KEYS = ["", "/abs", "../up", "a/../../b", "a//b", "a/", "nul\0", "\udcff"]


def test_it_is_a_store(store: Store) -> None:
    assert isinstance(store, Store)
    assert store.name
    assert store.kind


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\0\xff" * 700_000], ids=["empty", "small", "large"]
)
def test_what_is_put_can_be_read_and_described(store: Store, content: bytes) -> None:
    made = store.put("a/b.bin", io.BytesIO(content))
    with store.open("a/b.bin") as file:
        assert file.read() == content
    found = store.stat("a/b.bin")
    assert found == made
    assert found is not None
    assert (found.key, found.size) == ("a/b.bin", len(content))
    assert abs(datetime.now(timezone.utc) - found.mtime) < timedelta(minutes=5)
    assert found.version


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\0\xff" * 1_300_000], ids=["empty", "small", "large"]
)
def test_a_pipe_and_the_rest_of_a_file_are_stored(store: Store, content: bytes) -> None:
    """Streams need not know how long they are, nor stand at their beginning."""
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe, open(writing, "wb") as end:
        writer = threading.Thread(target=lambda: (end.write(content), end.close()))
        writer.start()
        assert store.put("pipe", pipe).size == len(content)
        writer.join()
    rest = io.BytesIO(b"head" + content)
    rest.seek(4)
    assert store.put("rest", rest).size == len(content)
    for key in ("pipe", "rest"):
        with store.open(key) as file:
            assert file.read() == content


def test_o02_nothing_is_ever_overwritten(store: Store) -> None:
    store.put("a", b"first")
    with pytest.raises(StoreConflict, match="'a'") as caught:
        store.put("a", b"second")
    assert caught.value.store == store.name
    with store.open("a") as file:
        assert file.read() == b"first"


def test_of_many_writers_of_one_key_exactly_one_wins(
    store: Store, needs: Callable[[str], None]
) -> None:
    needs("races")
    results: list[str] = []
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        barrier.wait()
        try:
            store.put("same/key", str(number).encode() * 1000)
            results.append(str(number))
        except StoreConflict:
            pass

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 1
    with store.open("same/key") as file:
        assert file.read() == results[0].encode() * 1000
    assert [item.key for item in store.list()] == ["same/key"]


def test_a_missing_object_is_none_or_an_error_that_names_it(store: Store) -> None:
    assert store.stat("no/such") is None
    with pytest.raises(StoreMissing, match="no/such"):
        store.open("no/such")
    assert store.sign_get("no/such", expires=HOUR).method == "GET"
    store.delete("no/such")


def test_a_directory_of_objects_is_no_object(store: Store) -> None:
    store.put("a/b", b"")
    assert store.stat("a") is None
    assert store.stat("a/b/c") is None
    with pytest.raises(StoreMissing):
        store.open("a")


def test_deleting_removes_only_that_object(store: Store) -> None:
    store.put("a/b", b"1")
    store.put("a/c", b"2")
    store.delete("a/b")
    assert [item.key for item in store.list("a/")] == ["a/c"]
    store.put("a/b", b"again")
    assert store.stat("a/b") is not None


def test_listing_goes_by_prefix_in_key_order(store: Store) -> None:
    for key in ("b/2", "b/1/x", "b-", "b", "c", "ba", "b/1.x"):
        if key != "b":
            store.put(key, b"x")
    keys = [item.key for item in store.list()]
    assert keys == sorted(keys)
    assert [item.key for item in store.list("b/")] == ["b/1.x", "b/1/x", "b/2"]
    assert [item.key for item in store.list("b/1")] == ["b/1.x", "b/1/x"]
    assert [item.key for item in store.list("nothing")] == []
    assert [item.key for item in store.list("no/thing/")] == []


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_names_survive(store: Store, key: str, needs: Callable[[str], None]) -> None:
    for character, feature in (("\n", "newlines"), ("\\", "backslashes")):
        if character in key:
            needs(feature)
    store.put(key, b"x")
    assert [item.key for item in store.list()] == [key]
    assert store.stat(key) is not None
    assert store.key_of(store.uri(key)) == key


@pytest.mark.parametrize("key", BAD_KEYS)
def test_malicious_keys_are_refused_by_every_operation(store: Store, key: str) -> None:
    for operation in (
        lambda: store.put(key, b"x"),
        lambda: store.open(key),
        lambda: store.stat(key),
        lambda: store.delete(key),
        lambda: store.sign_get(key, expires=HOUR),
        lambda: store.sign_put(key, expires=HOUR),
    ):
        with pytest.raises(StoreBadKey):
            operation()


def test_only_its_own_uris_are_served(store: Store) -> None:
    assert store.key_of("https://example.com/a") is None
    assert store.key_of("datum://a") is None
    assert store.key_of(store.uri("sets/**.jpg")) == "sets/**.jpg"


def test_a_put_is_granted_for_a_fresh_key_only(store: Store) -> None:
    grant = store.sign_put("a/new", expires=HOUR, size=10)
    assert grant.method == "PUT"
    assert store.stat("a/new") is None
