"""Reading, from stores of every kind that are set readonly: also those that nobody can write."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from tests.support.parted import request
from valohai_agent.protocol import Transfer
from valohai_dagster.errors import StoreBadKey, StoreMissing, StoreNotWritable
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.keys import Wildcard

HOUR = timedelta(hours=1)
CONTENT = bytes(range(256)) * 1000
Put = Callable[[str, bytes], Any]
Source = tuple[Store, Put]


def fetched(transfer: Transfer, *, span: str = "") -> bytes:
    """What a worker gets by the request as it stands."""
    if transfer.url.startswith("file:"):
        pytest.skip("elsewhere: workers read files themselves; the agent's own tests")
    answer = request(transfer, headers={"Range": span} if span else {})
    answer.raise_for_status()
    return answer.content


def test_what_is_there_can_be_described_and_read(source: Source) -> None:
    store, put = source
    put("a/b.bin", CONTENT)
    found = store.stat("a/b.bin")
    assert found is not None
    assert (found.key, found.size) == ("a/b.bin", len(CONTENT))
    assert found.version
    assert found == store.stat("a/b.bin")
    with store.open("a/b.bin") as file:
        assert file.read() == CONTENT


def test_reading_begins_where_it_is_asked_to(source: Source) -> None:
    store, put = source
    put("a", CONTENT)
    for offset in (1, 1000, len(CONTENT) - 1, len(CONTENT), len(CONTENT) + 10):
        with store.open("a", offset=offset) as file:
            assert file.read() == CONTENT[offset:]


def test_what_is_opened_is_read_in_pieces_of_any_size(source: Source) -> None:
    store, put = source
    put("a", b"one\ntwo\nthree")
    with store.open("a") as file:
        assert file.read(2) == b"on"
        assert file.readline() == b"e\n"
        assert list(file) == [b"two\n", b"three"]
        assert file.read() == b""


def test_an_empty_file_is_a_file(source: Source) -> None:
    store, put = source
    put("empty", b"")
    found = store.stat("empty")
    assert found is not None
    assert found.size == 0
    with store.open("empty") as file:
        assert file.read() == b""


def test_what_is_missing_is_none_or_an_error_that_names_it(source: Source) -> None:
    store, put = source
    put("present", b"")
    assert store.stat("no/such") is None
    with pytest.raises(StoreMissing, match="no/such"):
        store.open("no/such")


def test_other_content_is_another_version(source: Source) -> None:
    store, put = source
    put("one", b"1")
    put("two", b"22")
    one, two = store.stat("one"), store.stat("two")
    assert one is not None
    assert two is not None
    assert one.version != two.version


@pytest.mark.parametrize("key", ["a b", "ä/日本.txt", "100%25", "a?b#c", "q'\"q", "a+b&c=d;e"])
def test_a_signed_request_reads_the_object_whatever_its_name(source: Source, key: str) -> None:
    store, put = source
    put(key, b"content")
    assert fetched(store.sign_get(key, expires=HOUR)) == b"content"


def test_a_signed_request_reads_any_range(source: Source) -> None:
    store, put = source
    put("a", CONTENT)
    transfer = store.sign_get("a", expires=HOUR)
    assert fetched(transfer, span="bytes=100-199") == CONTENT[100:200]
    assert fetched(transfer, span=f"bytes={len(CONTENT) - 5}-") == CONTENT[-5:]


def test_i02_wildcards_select_what_lies_below(source: Source) -> None:
    store, put = source
    if store.kind == "http":
        pytest.skip("elsewhere: HTTP has no listings; test_http.py")
    for key in ("sets/a.jpg", "sets/b.png", "sets/deep/c.jpg", "other/d.jpg"):
        put(key, b"x")
    pattern = Wildcard(pattern=store.key_of(store.uri("sets/**/*.jpg")) or "")
    found = [item.key for item in store.list(pattern.root) if pattern.matches(item.key)]
    assert found == ["sets/a.jpg", "sets/deep/c.jpg"]


def test_a_listing_says_the_same_as_a_look(source: Source) -> None:
    store, put = source
    if store.kind == "http":
        pytest.skip("elsewhere: HTTP has no listings; test_http.py")
    put("a/1", b"1")
    put("a/2", b"22")
    assert [store.stat(item.key) for item in store.list()] == list(store.list())


def test_every_write_is_refused_and_changes_nothing(source: Source) -> None:
    store, put = source
    put("a", b"1")
    assert store.readonly
    writes: list[Callable[[], object]] = [
        lambda: store.put("b", b"x"),
        lambda: store.put("a", io.BytesIO(b"x")),
        lambda: store.delete("a"),
        lambda: store.sign_put("b", expires=HOUR, size=1),
    ]
    if store.kind != "local":
        writes.append(lambda: store.begin_parts("b", size=10**9))
    for write in writes:
        with pytest.raises(StoreNotWritable, match="main"):
            write()
    assert store.stat("b") is None
    assert store.stat("a") is not None


@pytest.mark.parametrize("key", ["", "/abs", "a/../../b", "a//b", "a/", "nul\0"])
def test_malicious_keys_are_refused(source: Source, key: str) -> None:
    store, _ = source
    for operation in (store.stat, store.open, lambda key: store.sign_get(key, expires=HOUR)):
        with pytest.raises(StoreBadKey):
            operation(key)


def test_t13_every_object_has_a_name_by_its_store(source: Source) -> None:
    store, _ = source
    assert store.key_of("store://main/a/b c.txt") == "a/b c.txt"
    assert store.key_of("store://other/a") is None
    assert store.key_of(store.uri("a/b c.txt")) == "a/b c.txt"
