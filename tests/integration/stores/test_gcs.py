"""What only Google Cloud Storage does, on two emulators: each is right where the other is not.

Neither checks signatures or who asks; that a signature is what Google expects, `test_a_signature_is_the_one_that_google_computes`
verifies with the public key, from the description of the V4 signing process.
"""

from __future__ import annotations

import hashlib
import io
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

import google.auth
import httpx
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from google.auth import credentials as google_credentials
from google.auth import iam

from tests.support.servers.google_key import EMAIL
from tests.support.servers.kinds import GcsServer
from tests.support.servers.stores import PART_BYTES, gcs_store
from valohai_agent.protocol import Transfer
from valohai_dagster.errors import (
    StoreConflict,
    StoreError,
    StoreNotWritable,
    StoreUnavailable,
)
from valohai_dagster.stores.base import PartedUpload
from valohai_dagster.stores.gcs import GcsStore

HOUR = timedelta(hours=1)
CONTENT = bytes(range(256)) * (PART_BYTES // 256) * 2 + b"end"


@pytest.fixture
def store(gcs_server: GcsServer) -> GcsStore:
    return cast("GcsStore", gcs_store(gcs_server))


@pytest.fixture
def sessions(gcs_session_server: GcsServer) -> GcsStore:
    return cast("GcsStore", gcs_store(gcs_session_server))


def call(transfer: Transfer, content: bytes | None = None) -> httpx.Response:
    return httpx.request(transfer.method, transfer.url, headers=transfer.headers, content=content)


def begin(store: GcsStore, key: str) -> tuple[PartedUpload, Transfer]:
    upload = store.begin_parts(key, size=len(CONTENT))
    assert upload is not None
    parts = store.sign_parts(key, upload, [1], expires=HOUR)
    assert (parts.style, parts.finish, parts.part_bytes) == ("session", None, PART_BYTES)
    return upload, parts.parts[1]


def send_chunk(session: Transfer, start: int, end: int) -> httpx.Response:
    content_range = f"bytes {start}-{end - 1}/{len(CONTENT)}"
    return httpx.put(
        session.url, headers={"Content-Range": content_range}, content=CONTENT[start:end]
    )


def test_a_signature_is_the_one_that_google_computes(
    store: GcsStore, gcs_server: GcsServer
) -> None:
    transfer = store.sign_put("a b/ä.txt", expires=HOUR, size=10)
    assert transfer.headers == {
        "x-goog-if-generation-match": "0",
        "x-goog-content-length-range": "0,10",
    }
    url = urlsplit(transfer.url)
    query = url.query.rpartition("&X-Goog-Signature=")
    fields = dict(parse_qsl(query[0]))
    headers = {"host": url.netloc, **transfer.headers}
    canonical = [
        *("PUT", url.path, query[0]),
        *(f"{name}:{headers[name]}" for name in sorted(headers)),
        *("", ";".join(sorted(headers)), "UNSIGNED-PAYLOAD"),
    ]
    scope = fields["X-Goog-Credential"].removeprefix(f"{EMAIL}/")
    hashed = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
    signed = "\n".join([fields["X-Goog-Algorithm"], fields["X-Goog-Date"], scope, hashed])
    public_key(gcs_server.credentials_file).verify(
        bytes.fromhex(query[2]), signed.encode(), padding.PKCS1v15(), hashes.SHA256()
    )
    assert fields["X-Goog-Expires"] == "3600"
    assert transfer.expires_at is not None
    assert abs(transfer.expires_at - datetime.now(timezone.utc) - HOUR) < timedelta(minutes=1)


def public_key(file: Path) -> rsa.RSAPublicKey:
    pem = json.loads(file.read_text())["private_key"].encode()
    key = serialization.load_pem_private_key(pem, None).public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    return key


def test_signatures_live_seven_days_at_most(store: GcsStore) -> None:
    assert "X-Goog-Expires=604800&" in store.sign_get("a", expires=timedelta(days=30)).url


def test_a_signed_put_writes_what_a_signed_get_reads(sessions: GcsStore) -> None:
    assert call(sessions.sign_put("a/b", expires=HOUR), b"content").status_code == 200
    assert call(sessions.sign_get("a/b", expires=HOUR)).content == b"content"


def test_o17_a_session_shows_nothing_before_its_last_chunk(sessions: GcsStore) -> None:
    assert sessions.begin_parts("big", size=PART_BYTES) is None
    upload, session = begin(sessions, "big")
    assert send_chunk(session, 0, PART_BYTES).status_code == 308
    assert sessions.stat("big") is None
    assert list(sessions.list()) == []
    asked = httpx.put(session.url, headers={"Content-Range": f"bytes */{len(CONTENT)}"})
    assert (asked.status_code, asked.headers["Range"]) == (308, f"bytes=0-{PART_BYTES - 1}")
    assert send_chunk(session, PART_BYTES, 2 * PART_BYTES).status_code == 308
    assert send_chunk(session, 2 * PART_BYTES, len(CONTENT)).status_code in (200, 201)
    assert sessions.open("big").read() == CONTENT
    sessions.abort_parts("big", upload)
    assert sessions.stat("big") is not None


def test_an_upload_that_is_given_up_is_told_to_the_server(
    store: GcsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator answers as Google does, but would take the next chunk all the same."""
    answers: list[tuple[str, int]] = []
    delete = httpx.Client.delete

    def watched(client: httpx.Client, url: Any, **options: Any) -> httpx.Response:
        answer = delete(client, url, **options)
        answers.append((str(url), answer.status_code))
        return answer

    monkeypatch.setattr(httpx.Client, "delete", watched)
    upload, session = begin(store, "gone")
    assert send_chunk(session, 0, PART_BYTES).status_code == 308
    store.abort_parts("gone", upload)
    assert answers == [(session.url, 499)]
    assert store.stat("gone") is None


def test_giving_up_twice_or_never_begun_is_silent(sessions: GcsStore) -> None:
    upload, _ = begin(sessions, "gone")
    sessions.abort_parts("gone", upload)
    sessions.abort_parts("gone", upload)
    sessions.abort_parts("never", upload)


def test_long_content_goes_by_a_session(sessions: GcsStore) -> None:
    assert sessions.put("long", io.BytesIO(CONTENT)).size == len(CONTENT)
    assert sessions.open("long", offset=PART_BYTES).read() == CONTENT[PART_BYTES:]


def test_listings_go_over_pages(store: GcsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("valohai_dagster.stores.gcs.PAGE", 2)
    for number in range(5):
        store.put(f"a/{number}", b"")
    assert [found.key for found in store.list("a/")] == [f"a/{number}" for number in range(5)]


def test_a_version_is_the_generation(store: GcsStore) -> None:
    first = store.put("a", b"one")
    store.delete("a")
    second = store.put("a", b"one")
    assert int(first.version) < int(second.version)


class MachineAccount(google_credentials.Credentials):
    """What a machine of Google's has: tokens, no key, and a name that comes with the first token."""

    service_account_email = "default"

    def __init__(self) -> None:
        super().__init__()
        self._universe_domain = "tests.invalid"

    def refresh(self, request: Any) -> None:
        self.token, self.service_account_email = "of-the-machine", EMAIL


def test_without_a_private_key_the_iam_api_signs(
    gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API itself cannot be had here: what would be sent to it is looked at."""
    asked: list[bytes] = []

    def sign(signer: iam.Signer, message: bytes) -> bytes:
        assert signer._service_account_email == EMAIL
        asked.append(message)
        return b"signature"

    monkeypatch.setattr(iam.Signer, "sign", sign)
    monkeypatch.setattr(google.auth, "default", lambda scopes: (MachineAccount(), "tests"))
    store = gcs_store(gcs_server, credentials_file=None)
    store.put("a", b"content")
    transfer = store.sign_get("a", expires=HOUR)
    assert asked[0].startswith(b"GOOG4-RSA-SHA256\n")
    assert transfer.url.endswith(f"X-Goog-Signature={b'signature'.hex()}")
    assert call(transfer).content == b"content"


def test_a_person_cannot_sign(gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Person(MachineAccount):
        service_account_email = None

        def refresh(self, request: Any) -> None:
            self.token = "of-a-person"

    monkeypatch.setattr(google.auth, "default", lambda scopes: (Person(), "tests"))
    store = gcs_store(gcs_server, credentials_file=None)
    with pytest.raises(StoreUnavailable, match=r"credentials_file in .stores.main"):
        store.sign_get("a", expires=HOUR)


def test_anonymous_requests_are_not_signed(gcs_server: GcsServer) -> None:
    store = gcs_store(gcs_server, credentials_file=None, anonymous=True, readonly=False)
    store.put("a b", b"content")
    transfer = store.sign_get("a b", expires=HOUR)
    assert "?" not in transfer.url
    assert call(transfer).content == b"content"


def test_errors_say_what_to_do_and_show_no_secret(
    gcs_server: GcsServer, gcs_session_server: GcsServer, tmp_path: Path
) -> None:
    missing = gcs_store(gcs_session_server, bucket="not-there")
    with pytest.raises(StoreUnavailable, match=r"HTTP 404.*there is no such bucket"):
        missing.put("a", b"")
    with pytest.raises(StoreError, match="HTTP 404"):
        list(missing.list())
    readonly = gcs_store(gcs_server, readonly=True)
    for write in (lambda: readonly.put("a", b""), lambda: readonly.delete("a")):
        with pytest.raises(StoreNotWritable, match="is set readonly"):
            write()
    broken = tmp_path / "key.json"
    broken.write_text('{"private_key": "hush"}')
    with pytest.raises(StoreUnavailable, match="key file of a service account") as caught:
        gcs_store(gcs_server, credentials_file=broken).sign_get("a", expires=HOUR)
    assert "hush" not in str(caught.value)


def test_o02_a_stream_is_refused_when_the_object_exists(store: GcsStore) -> None:
    store.put("a", io.BytesIO(b"first"))
    with pytest.raises(StoreConflict, match="never overwrite"):
        store.put("a", io.BytesIO(b"second"))
