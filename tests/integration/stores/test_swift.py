"""What only OpenStack Swift does, on Swift itself. Keystone is a stand-in; see `tests/support/servers/keystone.py`."""

from __future__ import annotations

import io
from datetime import timedelta
from typing import Any, cast

import httpx
import pytest

from tests.support.servers import keystone
from tests.support.servers.keystone import Keystone
from tests.support.servers.kinds import SwiftServer
from tests.support.servers.stores import PART_BYTES, fresh_name, swift_store, swift_token
from valohai_agent.protocol import Parts, Transfer
from valohai_dagster.errors import (
    StoreConflict,
    StoreMissing,
    StoreNotWritable,
    StoreUnavailable,
)
from valohai_dagster.stores.base import JoiningStore, PartedUpload
from valohai_dagster.stores.swift import SwiftStore

HOUR = timedelta(hours=1)
CONTENT = bytes(range(256)) * (PART_BYTES // 256) * 2 + b"end"


@pytest.fixture
def store(swift_server: SwiftServer) -> SwiftStore:
    return cast("SwiftStore", swift_store(swift_server))


def call(transfer: Transfer, content: bytes | None = None) -> httpx.Response:
    return httpx.request(transfer.method, transfer.url, headers=transfer.headers, content=content)


def raw_listing(server: SwiftServer, container: str) -> list[str]:
    """Names as the server has them, segments included."""
    headers = {"X-Auth-Token": swift_token(server)}
    answer = httpx.get(f"{server.storage_url}/{container}?format=json", headers=headers)
    return [found["name"] for found in answer.json()]


def container_of(store: SwiftStore) -> str:
    return store.place.rpartition("/")[2]


def begin(store: SwiftStore, key: str) -> PartedUpload:
    upload = store.begin_parts(key, size=len(CONTENT))
    assert upload is not None
    return upload


def send_segments(parts: Parts) -> None:
    for number, transfer in parts.parts.items():
        start = (number - 1) * parts.part_bytes
        assert call(transfer, CONTENT[start : start + parts.part_bytes]).status_code == 201


def test_o17_segments_become_an_object_when_they_are_joined(
    store: SwiftStore, swift_server: SwiftServer
) -> None:
    assert isinstance(store, JoiningStore)
    assert store.begin_parts("big", size=PART_BYTES) is None
    upload = begin(store, "big")
    parts = store.sign_parts("big", upload, [1, 2, 3], expires=HOUR)
    assert (parts.style, parts.finish) == ("swift", None)
    send_segments(parts)
    assert store.stat("big") is None
    assert list(store.list()) == []
    made = store.join_parts("big", upload, size=len(CONTENT))
    assert made == store.stat("big") == store.join_parts("big", upload, size=len(CONTENT))
    assert [(found.key, found.size, found.version) for found in store.list()] == [
        ("big", len(CONTENT), made.version)
    ]
    assert store.open("big", offset=PART_BYTES - 1).read() == CONTENT[PART_BYTES - 1 :]
    assert call(store.sign_get("big", expires=HOUR)).content == CONTENT
    store.abort_parts("big", upload)
    assert store.open("big").read() == CONTENT, "what is finished is not given up"
    store.delete("big")
    assert raw_listing(swift_server, f"{container_of(store)}_segments") == []


def test_segments_that_are_missing_or_short_make_no_object(store: SwiftStore) -> None:
    upload = begin(store, "torn")
    parts = store.sign_parts("torn", upload, [1, 2, 3], expires=HOUR)
    send_segments(parts.model_copy(update={"parts": {1: parts.parts[1], 3: parts.parts[3]}}))
    with pytest.raises(StoreMissing, match="of 3 segments some are missing"):
        store.join_parts("torn", upload, size=len(CONTENT))
    assert call(parts.parts[2], b"short").status_code == 201
    with pytest.raises(StoreMissing):
        store.join_parts("torn", upload, size=len(CONTENT))
    assert store.stat("torn") is None


def test_o02_joining_never_overwrites(store: SwiftStore) -> None:
    store.put("taken", b"first")
    upload = begin(store, "taken")
    send_segments(store.sign_parts("taken", upload, [1, 2, 3], expires=HOUR))
    with pytest.raises(StoreConflict, match="never overwrite"):
        store.join_parts("taken", upload, size=len(CONTENT))
    assert store.open("taken").read() == b"first"


def test_wiping_leaves_no_segment_of_uploads_that_nobody_remembers(
    swift_server: SwiftServer, store: SwiftStore
) -> None:
    for _ in range(2):
        upload = begin(store, "gone")
        send_segments(store.sign_parts("gone", upload, [1, 2], expires=HOUR))
    store.wipe("gone")
    assert raw_listing(swift_server, f"{container_of(store)}_segments") == []


def test_an_upload_that_is_given_up_leaves_no_segment(
    store: SwiftStore, swift_server: SwiftServer
) -> None:
    upload, other = begin(store, "gone"), begin(store, "gone")
    send_segments(store.sign_parts("gone", upload, [1, 2], expires=HOUR))
    send_segments(store.sign_parts("gone", other, [1], expires=HOUR))
    store.abort_parts("gone", upload)
    store.abort_parts("gone", upload)
    left = raw_listing(swift_server, f"{container_of(store)}_segments")
    assert [other.token in name for name in left] == [True]


def test_a_signed_put_never_overwrites(store: SwiftStore) -> None:
    grant = store.sign_put("a/b", expires=HOUR)
    assert call(grant, b"first").status_code == 201
    assert call(grant, b"second").status_code == 412
    assert store.open("a/b").read() == b"first"


def test_a_signature_opens_one_object_for_one_thing(store: SwiftStore) -> None:
    store.put("a", b"mine")
    store.put("b", b"other")
    grant = store.sign_get("a", expires=HOUR)
    assert call(grant).content == b"mine"
    assert httpx.get(grant.url.replace("/a?", "/b?")).status_code == 401
    assert httpx.put(grant.url, content=b"x").status_code == 401
    assert call(store.sign_get("a", expires=-HOUR)).status_code == 401


@pytest.mark.parametrize("digest", ["sha256", "sha512", "sha1"])
def test_signatures_use_a_digest_that_the_cluster_takes(
    swift_server: SwiftServer, monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    """The server takes all three; ours are cut down to one, as if it were the only one in common."""
    monkeypatch.setattr("valohai_dagster.stores.swift_account.DIGESTS", (digest,))
    store = swift_store(swift_server)
    assert call(store.sign_put("a/b c", expires=HOUR), b"content").status_code == 201
    assert call(store.sign_get("a/b c", expires=HOUR)).content == b"content"


def test_content_of_unknown_or_great_length_is_stored_in_segments(
    store: SwiftStore, swift_server: SwiftServer
) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    for key, content in (("long", CONTENT), ("even", CONTENT[: 2 * PART_BYTES]), ("none", b"")):
        assert store.put(key, Pipe(content)).size == len(content)
        assert store.open(key).read() == content
    with pytest.raises(StoreConflict):
        store.put("long", io.BytesIO(CONTENT))
    for key in ("long", "even", "none"):
        store.delete(key)
    assert raw_listing(swift_server, f"{container_of(store)}_segments") == []


def test_the_key_of_one_container_signs_with_segments_inside_it(swift_server: SwiftServer) -> None:
    container, secret = fresh_name(), "of-the-container"
    headers = {
        "X-Auth-Token": swift_token(swift_server),
        "X-Container-Meta-Temp-URL-Key": secret,
    }
    httpx.put(f"{swift_server.storage_url}/{container}", headers=headers).raise_for_status()
    store = swift_store(swift_server, container=container, temp_url_key=secret)
    store.put("big", io.BytesIO(CONTENT))
    assert call(store.sign_get("big", expires=HOUR)).content == CONTENT
    assert [found.key for found in store.list()] == ["big"]
    assert len(raw_listing(swift_server, container)) == 4


def test_an_account_without_a_key_says_what_to_do(swift_server: SwiftServer) -> None:
    user = {"user": "elsewhere:someone", "project": "elsewhere"}
    login = {"X-Auth-User": user["user"], "X-Auth-Key": "testing"}
    answer = httpx.get(swift_server.auth_url, headers=login)
    container = f"{answer.headers['X-Storage-Url']}/things"
    httpx.put(
        container, headers={"X-Auth-Token": answer.headers["X-Auth-Token"]}
    ).raise_for_status()
    store = swift_store(swift_server, container="things", **user)
    with pytest.raises(StoreUnavailable, match="swift post -m 'Temp-URL-Key"):
        store.sign_get("a", expires=HOUR)


V3_USER = {"user": keystone.USER, "key": keystone.PASSWORD, "project": keystone.PROJECT}
V3_APPLICATION = {
    "user": None,
    "key": None,
    "project": None,
    "application_credential_id": keystone.APPLICATION,
    "application_credential_secret": keystone.APPLICATION_SECRET,
}


@pytest.mark.parametrize("login", [V3_USER, V3_APPLICATION], ids=["password", "application"])
def test_keystone_gives_tokens_and_the_address_of_the_region(
    swift_server: SwiftServer, login: dict[str, Any]
) -> None:
    with Keystone(swift_server) as server:
        version = {"auth_version": "3", "auth_url": server.auth_url, "region": keystone.REGION}
        store = swift_store(swift_server, **version, **login)
        store.put("a", b"content")
        assert store.open("a").read() == b"content"
        assert [found.key for found in store.list()] == ["a"]
        assert server.issued == 1


def test_a_token_that_is_refused_is_renewed(swift_server: SwiftServer) -> None:
    with Keystone(swift_server) as server:
        version = {"auth_version": "3", "auth_url": server.auth_url, "region": keystone.REGION}
        store = cast("SwiftStore", swift_store(swift_server, **version, **V3_USER))
        store.put("a", b"content")
        login = store._account._adapter.session.auth  # a token that Swift has forgotten
        login.auth_ref._auth_token = "AUTH_tkforgotten"
        assert store.stat("a") is not None
        assert server.issued == 2


def test_errors_say_what_to_do_and_show_no_secret(swift_server: SwiftServer) -> None:
    refused = swift_store(swift_server, key="wrong-secret")
    with pytest.raises(
        StoreNotWritable, match=r"HTTP 401.*check the credentials in \[stores.main"
    ) as caught:
        refused.put("a", b"x")
    with pytest.raises(StoreUnavailable, match="HTTP 401"):
        refused.stat("a")
    assert "wrong-secret" not in str(caught.value) + repr(refused)
    missing = swift_store(swift_server, container="not-there")
    with pytest.raises(StoreUnavailable, match="there is no such bucket or container"):
        missing.put("a", b"")
    away = swift_store(swift_server, auth_url="http://127.0.0.1:9/auth/v1.0")
    with pytest.raises(StoreUnavailable, match="no answer"):
        away.stat("a")
