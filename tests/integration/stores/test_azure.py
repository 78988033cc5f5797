"""What only Azure Blob Storage does, on Azurite, which checks signatures, their permissions and their end."""

from __future__ import annotations

import base64
import json
import logging
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest
from azure.core.credentials import AccessToken

from tests.support.servers import kinds
from tests.support.servers.kinds import AzureServer
from tests.support.servers.stores import PART_BYTES, azure_store
from tests.support.tls import Authority
from valohai_agent.protocol import Parts, Transfer, block_id
from valohai_dagster.errors import StoreBadKey, StoreError, StoreNotWritable, StoreUnavailable
from valohai_dagster.stores.azure import AzureStore
from valohai_dagster.stores.base import PartedUpload

HOUR = timedelta(hours=1)
CONTENT = bytes(range(256)) * (PART_BYTES // 256) * 2 + b"end"


@pytest.fixture
def store(azure_server: AzureServer) -> AzureStore:
    return cast("AzureStore", azure_store(azure_server))


def call(transfer: Transfer, content: bytes = b"") -> httpx.Response:
    return httpx.request(
        transfer.method, transfer.url, headers=transfer.headers, content=content or None
    )


def begin(store: AzureStore, key: str) -> PartedUpload:
    upload = store.begin_parts(key, size=len(CONTENT))
    assert upload is not None
    return upload


def send_blocks(parts: Parts) -> None:
    for number, transfer in parts.parts.items():
        start = (number - 1) * parts.part_bytes
        assert call(transfer, CONTENT[start : start + parts.part_bytes]).status_code == 201


def block_list(*numbers: int) -> bytes:
    ids = "".join(f"<Latest>{block_id(number)}</Latest>" for number in numbers)
    return f"<?xml version='1.0' encoding='utf-8'?><BlockList>{ids}</BlockList>".encode()


def test_a_signed_put_creates_and_never_overwrites(store: AzureStore) -> None:
    grant = store.sign_put("a/b", expires=HOUR, size=5)
    assert call(grant, b"first").status_code == 201
    assert call(grant, b"second").status_code in (403, 409)
    bare = grant.model_copy(update={"headers": {"x-ms-blob-type": "BlockBlob"}})
    assert call(bare, b"third").status_code == 403, "the signature may only create"
    assert store.open("a/b").read() == b"first"


def test_a_signature_opens_one_blob_for_one_thing(store: AzureStore) -> None:
    store.put("a", b"mine")
    store.put("b", b"other")
    grant = store.sign_get("a", expires=HOUR)
    assert call(grant).content == b"mine"
    assert httpx.get(grant.url.replace("/a?", "/b?")).status_code == 403
    assert httpx.delete(grant.url).status_code == 403
    assert call(store.sign_get("a", expires=-HOUR)).status_code == 403


def test_o17_blocks_become_a_blob_at_the_finish_only(store: AzureStore) -> None:
    assert store.begin_parts("big", size=PART_BYTES) is None
    upload = begin(store, "big")
    parts = store.sign_parts("big", upload, [1, 2, 3], expires=HOUR)
    assert (parts.style, parts.part_bytes) == ("azure", PART_BYTES)
    send_blocks(parts)
    assert store.stat("big") is None
    assert list(store.list()) == []
    assert parts.finish is not None
    assert call(parts.finish, block_list(1, 2, 3)).status_code == 201
    assert store.open("big").read() == CONTENT
    assert call(parts.finish, block_list(3)).status_code in (400, 409)
    store.abort_parts("big", upload)
    assert store.open("big", offset=len(CONTENT) - 3).read() == b"end"


def test_many_parts_make_larger_blocks(store: AzureStore) -> None:
    upload = store.begin_parts("huge", size=200_000 * PART_BYTES)
    assert upload is not None
    assert upload.part_bytes == 4 * PART_BYTES


def test_an_upload_that_is_given_up_leaves_nothing(store: AzureStore) -> None:
    upload = begin(store, "gone")
    parts = store.sign_parts("gone", upload, [1], expires=HOUR)
    send_blocks(parts)
    store.abort_parts("gone", upload)
    store.abort_parts("gone", upload)
    assert store.stat("gone") is None
    assert parts.finish is not None
    assert call(parts.finish, block_list(1)).status_code == 400, "its blocks are forgotten"


def test_a_connection_string_does_as_well(azure_server: AzureServer, store: AzureStore) -> None:
    text = (
        f"DefaultEndpointsProtocol=http;AccountName={azure_server.account};"
        f"AccountKey={azure_server.key};BlobEndpoint={azure_server.endpoint};"
    )
    other = azure_store(
        azure_server, account=None, account_key=None, endpoint_url=None, connection_string=text
    )
    other.put("a", b"content")
    assert call(other.sign_get("a", expires=HOUR)).content == b"content"
    assert other.uri("a").startswith(f"azure://{azure_server.account}/")


USER_ID, TENANT_ID = str(uuid.uuid4()), str(uuid.uuid4())


@dataclass
class EntraUser:
    """Tokens with the claims that Azurite looks at; the signature, which it does not check, is missing."""

    asked: int = 0

    def get_token(self, *scopes: str, **_options: Any) -> AccessToken:
        self.asked += 1
        now = int(time.time())
        claims = {
            "aud": "https://storage.azure.com",
            "iss": f"https://sts.windows.net/{TENANT_ID}/",
            "iat": now,
            "nbf": now - 60,
            "exp": now + 3600,
            "oid": USER_ID,
            "tid": TENANT_ID,
        }
        parts = ({"alg": "RS256", "typ": "JWT"}, claims)
        words = [base64.urlsafe_b64encode(json.dumps(part).encode()) for part in parts]
        token = b".".join([*(word.rstrip(b"=") for word in words), b"c2lnbmF0dXJl"])
        return AccessToken(token.decode(), now + 3600)


def test_without_the_accounts_key_a_delegation_key_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entra is played by a credential that makes its own tokens; Azurite takes them and hands out delegation keys.

    It computes signatures made with those by the rules of an older version of the service, so the URL is looked at.
    """
    certificate = Authority(tmp_path).issue("azure")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate.authority))
    user = EntraUser()
    monkeypatch.setattr("azure.identity.DefaultAzureCredential", lambda: user)
    with kinds.azurite(certificate=certificate) as server:
        store = azure_store(server, account_key=None)
        assert store.put("a", b"content") == store.stat("a")
        url = urlsplit(store.sign_get("a", expires=HOUR).url)
        asked = user.asked
        store.sign_put("b", expires=timedelta(days=1))
        assert user.asked == asked, "one key signs for days"
    fields = dict(parse_qsl(url.query))
    assert (fields["sp"], fields["sr"], fields["spr"]) == ("r", "b", "https")
    assert (fields["skoid"], fields["sktid"]) == (USER_ID, TENANT_ID)
    assert fields["ske"] > fields["se"]


def test_the_log_shows_no_signature(store: AzureStore, caplog: pytest.LogCaptureFixture) -> None:
    store.put("a", b"content")
    with caplog.at_level(logging.INFO):
        grant = store.sign_get("a", expires=HOUR)
        store.open("a").read()
        call(grant)
    assert "HTTP Request: GET" in caplog.text
    assert "sig=" not in caplog.text.replace("sig=REDACTED", "")


def test_backslashes_are_refused(store: AzureStore) -> None:
    with pytest.raises(StoreBadKey, match="takes a backslash for a slash"):
        store.put("a\\b", b"")


def test_errors_say_what_to_do_and_show_no_secret(azure_server: AzureServer) -> None:
    secret = "c2VjcmV0LXNlY3JldC1zZWNyZXQ="
    refused = azure_store(azure_server, account_key=secret)
    with pytest.raises(
        StoreNotWritable, match=r"HTTP 403 .*check the credentials in \[stores.main"
    ) as caught:
        refused.put("a", b"x")
    with pytest.raises(StoreUnavailable, match="HTTP 403"):
        refused.stat("a")
    missing = azure_store(azure_server, container="not-there")
    for use in (
        lambda: missing.put("a", b""),
        lambda: missing.stat("a"),
        lambda: list(missing.list()),
    ):
        with pytest.raises(
            StoreError, match=r"ContainerNotFound; there is no such bucket or container"
        ):
            use()
    assert secret not in str(caught.value) + repr(refused)
    readonly = azure_store(azure_server, readonly=True)
    for write in (lambda: readonly.put("a", b""), lambda: readonly.delete("a")):
        with pytest.raises(StoreNotWritable, match="is set readonly"):
            write()
