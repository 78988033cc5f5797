"""Writes by signed requests, as a plain HTTP client sends them: whole files and files in parts."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import httpx
import pytest

from tests.support import parted
from tests.support.parted import begun, in_order, numbers_of, request, send, send_parts
from tests.support.ports import wait_for
from valohai_agent.protocol import Transfer
from valohai_dagster.stores.base import Store

HOUR = timedelta(hours=1)
REFUSED = (401, 403)
Needs = Callable[[str], None]


@pytest.fixture
def store(remote: Store) -> Store:
    return remote


def large(store: Store) -> bytes:
    """Two parts and a bit, no two of them alike."""
    size = store._section.part_bytes  # pyright: ignore
    return b"1" * size + b"2" * size + b"the end"


def content_of(store: Store, key: str) -> bytes:
    with store.open(key) as file:
        return file.read()


@pytest.mark.parametrize("key", ["a/plain", "a b", "ä/日本.txt", "100%25", "a?b#c", "q'\"q"])
def test_a_signed_put_writes_the_object(store: Store, key: str) -> None:
    transfer = store.sign_put(key, expires=HOUR, size=7)
    assert transfer.method == "PUT"
    send(transfer, b"content")
    assert content_of(store, key) == b"content"


def test_o02_a_signed_put_never_overwrites(store: Store, needs: Needs) -> None:
    needs("conditions")
    transfer = store.sign_put("a", expires=HOUR)
    send(transfer, b"first")
    for again in (transfer, store.sign_put("a", expires=HOUR)):
        assert request(again, b"second").status_code in (403, 409, 412)
    assert content_of(store, "a") == b"first"


def test_a_signed_put_takes_an_empty_file(store: Store) -> None:
    send(store.sign_put("empty", expires=HOUR, size=0), b"")
    assert content_of(store, "empty") == b""


def test_a_small_file_has_no_parts(store: Store) -> None:
    assert store.begin_parts("a", size=10) is None
    assert store.begin_parts("a", size=0) is None


def test_o17_a_large_file_is_visible_when_it_is_whole(store: Store) -> None:
    content = large(store)
    upload = begun(store, "big/file", size=len(content))
    numbers = numbers_of(upload, content)
    assert len(numbers) == 3
    order = numbers if in_order(upload) else [numbers[2], numbers[0], numbers[1]]
    tags = send_parts(store, "big/file", upload, content, order[:2])
    assert store.stat("big/file") is None
    assert list(store.list("big/")) == []
    tags |= send_parts(store, "big/file", upload, content, order[2:])
    answer = parted.finish(store, "big/file", upload, tags, size=len(content))
    assert answer is None or answer.is_success, answer.text
    assert content_of(store, "big/file") == content
    found = store.stat("big/file")
    assert found is not None
    assert found.size == len(content)
    assert [item.key for item in store.list()] == ["big/file"]


def test_a_part_may_be_sent_again(store: Store) -> None:
    """As after a broken connection, or when its URL ran out."""
    content = large(store)
    upload = begun(store, "again", size=len(content))
    if in_order(upload):
        pytest.skip("elsewhere: a session asks how far it got; the agent's own tests")
    tags = send_parts(store, "again", upload, b"x" * len(content), [2, 1])
    tags |= send_parts(store, "again", upload, content, [1, 2, 3])
    parted.finish(store, "again", upload, tags, size=len(content))
    assert content_of(store, "again") == content


def test_an_upload_that_is_given_up_leaves_nothing(store: Store) -> None:
    content = large(store)
    upload = begun(store, "gone", size=len(content))
    send_parts(store, "gone", upload, content, [1, 2])
    store.abort_parts("gone", upload)
    store.abort_parts("gone", upload)
    assert store.stat("gone") is None
    assert list(store.list()) == []


def test_wiping_leaves_nothing_of_uploads_that_nobody_remembers(store: Store) -> None:
    content = large(store)
    begun(store, "gone", size=len(content))  # nobody has kept what the store calls it
    lost = begun(store, "gone", size=len(content))
    send_parts(store, "gone", lost, content, [1, 2])
    kept = begun(store, "gone.2", size=len(content))
    tags = send_parts(store, "gone.2", kept, content, [1])
    if lost.style == "session":
        store.abort_parts("gone", lost)  # such a store forgets it by itself, in a week
    store.wipe("gone")
    store.wipe("gone")
    assert list(store.list()) == []
    tags |= send_parts(store, "gone.2", kept, content, [2, 3])
    parted.finish(store, "gone.2", kept, tags, size=len(content))
    assert content_of(store, "gone.2") == content
    store.wipe("gone.2")
    assert list(store.list()) == []


def test_giving_up_a_finished_upload_keeps_the_object(store: Store) -> None:
    content = large(store)
    upload = begun(store, "done", size=len(content))
    tags = send_parts(store, "done", upload, content, numbers_of(upload, content))
    parted.finish(store, "done", upload, tags, size=len(content))
    store.abort_parts("done", upload)
    assert content_of(store, "done") == content


def test_o02_an_upload_in_parts_never_overwrites(store: Store, needs: Needs) -> None:
    needs("conditions")
    content = large(store)
    upload = begun(store, "taken", size=len(content))
    if in_order(upload):
        pytest.skip("elsewhere: its condition is part of the session; tests/integration/stores")
    if upload.style == "swift":
        pytest.skip("elsewhere: the control plane looks first; tests/integration/stores")
    store.put("taken", b"first")
    tags = send_parts(store, "taken", upload, content, numbers_of(upload, content))
    answer = parted.finish(store, "taken", upload, tags, size=len(content))
    assert answer is not None
    assert answer.status_code in (409, 412)
    store.abort_parts("taken", upload)
    assert content_of(store, "taken") == b"first"


def test_what_is_purged_is_gone_for_signed_requests_too(store: Store) -> None:
    store.put("a", b"1")
    transfer = store.sign_get("a", expires=HOUR)
    store.delete("a")
    assert request(transfer).status_code == 404


# -- signatures -------------------------------------------------------------------------------------------------


def tampered(transfer: Transfer, key: str, other: str) -> Transfer:
    assert key in transfer.url
    return transfer.model_copy(update={"url": transfer.url.replace(key, other, 1)})


def test_a_signature_is_for_one_object_only(store: Store, needs: Needs) -> None:
    needs("signatures")
    store.put("mine", b"1")
    store.put("other", b"2")
    assert request(store.sign_get("mine", expires=HOUR)).is_success
    got = request(tampered(store.sign_get("mine", expires=HOUR), "mine", "other"))
    assert got.status_code in REFUSED
    written = request(tampered(store.sign_put("fresh", expires=HOUR), "fresh", "third"), b"x")
    assert written.status_code in REFUSED
    assert store.stat("third") is None


def test_a_signature_to_read_does_not_write(store: Store, needs: Needs) -> None:
    needs("signatures")
    transfer = store.sign_get("fresh", expires=HOUR)
    headers = store.sign_put("fresh", expires=HOUR).headers
    answer = httpx.put(transfer.url, content=b"x", headers=headers)
    assert answer.status_code in REFUSED
    assert store.stat("fresh") is None


def test_a_signature_ends(store: Store, needs: Needs) -> None:
    needs("signatures")
    store.put("a", b"1")
    transfer = store.sign_get("a", expires=timedelta(seconds=1))
    assert transfer.expires_at is not None
    wait_for(lambda: request(transfer).status_code in REFUSED, what="the end of the signature")
    assert request(store.sign_get("a", expires=HOUR)).is_success


def test_without_a_signature_nothing_is_read(store: Store, needs: Needs) -> None:
    needs("signatures")
    store.put("a", b"1")
    url = store.sign_get("a", expires=HOUR).url.partition("?")[0]
    assert httpx.get(url).is_client_error
