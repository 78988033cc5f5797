"""What is special about S3: credentials and roles, regions, encryption, and what its errors say."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta, timezone
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import SecretStr

from tests.support import web as scripted
from tests.support.parted import begun, request, send, send_parts
from tests.support.ports import free_port
from tests.support.servers.kinds import SwiftServer
from tests.support.servers.s3_stores import PART_BYTES, s3_client, s3_store, swift_s3_store
from valohai_dagster.errors import (
    StoreBadKey,
    StoreConflict,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreNotWritable,
    StoreUnavailable,
)
from valohai_dagster.settings_stores import S3StoreSettings
from valohai_dagster.stores.registry import make_store
from valohai_dagster.stores.s3 import S3Store
from valohai_dagster.stores.s3_access import session_policy

HOUR = timedelta(hours=1)


def parameters(url: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}


def open_uploads(store: S3Store, endpoint: str, *keys: str) -> list[Any]:
    with closing(s3_client(endpoint, *keys)) as client:
        return client.list_multipart_uploads(Bucket=store.place).get("Uploads", [])


# -- contents ---------------------------------------------------------------------------------------------------


class Dripping(io.RawIOBase):
    """A stream that cannot be sought and gives less than it is asked for; breaks at the end if told so."""

    def __init__(self, size: int, *, breaks: bool = False) -> None:
        super().__init__()
        self._left, self._breaks = size, breaks

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        if self._left == 0 and self._breaks:
            raise OSError("the disk is gone")
        count = min(self._left, 700_000, size if size >= 0 else self._left)
        self._left -= count
        return b"d" * count


def test_a_stream_is_stored_in_parts(moto_server: str) -> None:
    store = s3_store(moto_server)
    size = 3 * PART_BYTES + 5
    stored = store.put("big", cast("BinaryIO", Dripping(size)))
    assert stored.size == size
    assert stored.version.endswith("-4")  # S3 says so of what was put together from four parts
    assert open_uploads(store, moto_server) == []


def test_a_stream_of_exactly_one_part_is_stored_whole(moto_server: str) -> None:
    store = s3_store(moto_server)
    assert store.put("one", cast("BinaryIO", Dripping(PART_BYTES))).size == PART_BYTES


def test_a_stream_that_breaks_leaves_nothing(moto_server: str) -> None:
    store = s3_store(moto_server)
    with pytest.raises(OSError, match="the disk is gone"):
        store.put("big", cast("BinaryIO", Dripping(2 * PART_BYTES, breaks=True)))
    assert store.stat("big") is None
    assert open_uploads(store, moto_server) == []


def test_o02_a_large_stream_never_overwrites(moto_server: str) -> None:
    store = s3_store(moto_server)
    store.put("taken", b"first")
    with pytest.raises(StoreConflict, match="never overwrite"):
        store.put("taken", cast("BinaryIO", Dripping(2 * PART_BYTES)))
    assert open_uploads(store, moto_server) == []
    with store.open("taken") as file:
        assert file.read() == b"first"


def test_o17_parts_that_are_given_up_are_gone_from_the_server(swift_server: SwiftServer) -> None:
    store = swift_s3_store(swift_server)
    content = b"x" * (2 * PART_BYTES)
    upload = begun(store, "big", size=len(content))
    send_parts(store, "big", upload, content, [1, 2])
    keys = (swift_server.access_key, swift_server.secret_key)
    assert len(open_uploads(store, swift_server.s3_endpoint, *keys)) == 1
    store.abort_parts("big", upload)
    assert open_uploads(store, swift_server.s3_endpoint, *keys) == []


def test_a_signed_put_is_for_the_size_that_was_announced(swift_server: SwiftServer) -> None:
    store = swift_s3_store(swift_server)
    transfer = store.sign_put("a", expires=HOUR, size=5)
    for other in (b"1234", b"123456"):
        length = {"Content-Length": str(len(other))}
        assert request(transfer, other, headers=length).status_code == 403
    assert store.stat("a") is None
    send(transfer, b"12345")


def test_o17_parts_grow_with_the_file(moto_server: str) -> None:
    store = s3_store(moto_server)
    assert store.begin_parts("k", size=PART_BYTES) is None
    size = 5 * 1024**4
    upload = begun(store, "k", size=size)
    assert PART_BYTES < size // 10_000 <= upload.part_bytes
    assert upload.part_bytes % 1024**2 == 0


def test_listings_have_many_pages(moto_server: str) -> None:
    store = s3_store(moto_server)
    with closing(s3_client(moto_server)) as client:
        for number in range(1005):
            client.put_object(Bucket=store.place, Key=f"many/{number:04}", Body=b"")
        client.put_object(Bucket=store.place, Key="many/", Body=b"")
    keys = [item.key for item in store.list("many/")]
    assert keys == [f"many/{number:04}" for number in range(1005)]


def test_without_conditional_writes_the_store_looks_first(moto_server: str) -> None:
    store = s3_store(moto_server, conditional_writes=False)
    assert store.sign_put("a", expires=HOUR).headers == {}
    store.put("a", b"1")
    with pytest.raises(StoreConflict, match="'a'"):
        store.put("a", b"2")


def test_keys_that_s3_cannot_take_are_refused_here(moto_server: str) -> None:
    store = s3_store(moto_server)
    with pytest.raises(StoreBadKey, match="1024 bytes"):
        store.stat("/".join(["x" * 200] * 6))


# -- encryption -------------------------------------------------------------------------------------------------


def test_e48_uploads_ask_for_the_key_of_the_settings(moto_server: str) -> None:
    key = "arn:aws:kms:us-east-1:123456789012:key/1"
    store = s3_store(moto_server, kms_key_id=key)
    transfer = store.sign_put("a", expires=HOUR)
    assert transfer.headers["x-amz-server-side-encryption"] == "aws:kms"
    assert transfer.headers["x-amz-server-side-encryption-aws-kms-key-id"] == key
    signed = parameters(transfer.url)["X-Amz-SignedHeaders"].split(";")
    assert set(signed) == {"host", *(name.lower() for name in transfer.headers)}
    send(transfer, b"1")
    store.put("b", b"2")
    content = b"x" * (PART_BYTES + 1)
    store.put("c", content)
    with closing(s3_client(moto_server)) as client:
        for name in "abc":
            head = client.head_object(Bucket=store.place, Key=name)
            assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", key)


def test_e48_encryption_without_a_key_of_ones_own(moto_server: str) -> None:
    store = s3_store(moto_server, encryption="AES256")
    assert store.sign_put("a", expires=HOUR).headers["x-amz-server-side-encryption"] == "AES256"
    store.put("a", b"1")


# -- credentials ------------------------------------------------------------------------------------------------

ROLE = "arn:aws:iam::123456789012:role/stores"


def test_e43_a_role_is_assumed_and_its_urls_end_with_its_credentials(moto_server: str) -> None:
    store = s3_store(moto_server, role_arn=ROLE, sts_endpoint_url=moto_server, role_seconds=900)
    transfer = store.sign_get("a", expires=timedelta(hours=5))
    found = parameters(transfer.url)
    assert found["X-Amz-Security-Token"]
    assert not found["X-Amz-Credential"].startswith("testing/")
    assert int(found["X-Amz-Expires"]) <= 901  # both ends are whole seconds
    assert transfer.expires_at is not None
    assert transfer.expires_at - datetime.now(timezone.utc) < timedelta(seconds=901)
    store.put("a", b"1")
    assert request(transfer).content == b"1"


def test_e43_credentials_of_a_role_are_kept_until_they_near_their_end(moto_server: str) -> None:
    store = s3_store(moto_server, role_arn=ROLE, sts_endpoint_url=moto_server, role_seconds=3600)
    first, second = (
        parameters(store.sign_get(key, expires=HOUR).url)["X-Amz-Credential"] for key in "ab"
    )
    assert first == second


def test_e43_credentials_of_a_role_are_fetched_anew_before_they_run_out(moto_server: str) -> None:
    store = s3_store(moto_server, role_arn=ROLE, sts_endpoint_url=moto_server, role_seconds=3600)
    first = parameters(store.sign_get("a", expires=HOUR).url)
    credentials: Any = store._access._session.get_credentials()
    credentials._expiry_time = datetime.now(timezone.utc) + timedelta(seconds=200)
    second = parameters(store.sign_get("a", expires=HOUR).url)
    assert second["X-Amz-Credential"] != first["X-Amz-Credential"]
    assert int(second["X-Amz-Expires"]) > 3000


def test_e43_the_session_policy_names_this_bucket_only() -> None:
    section = S3StoreSettings(
        kind="s3", bucket="models", role_arn="arn:aws-cn:iam::1:role/x", kms_key_id="arn:k"
    )
    policy = session_policy(section)
    assert " " not in policy  # some servers take it only so
    assert '"Resource":"arn:aws-cn:s3:::models/*"' in policy
    for action in ("AbortMultipartUpload", "ListMultipartUploadParts", "GetBucketLocation"):
        assert f"s3:{action}" in policy
    assert '"Resource":"arn:k"' in policy
    reading = session_policy(section.model_copy(update={"readonly": True}))
    assert "PutObject" not in reading
    assert "DeleteObject" not in reading
    elsewhere = session_policy(section.model_copy(update={"endpoint_url": "http://x"}))
    assert "kms:" not in elsewhere


def test_a_role_that_cannot_be_assumed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted.serve() as server:
        server.answers["/"] = [refusing(403, "AccessDenied", namespace="ErrorResponse")]
        store = bare(server.url(""), role_arn=ROLE, sts_endpoint_url=server.url(""))
        with pytest.raises(StoreUnavailable, match=f"cannot assume the role {ROLE}.*trust policy"):
            store.sign_get("a", expires=HOUR)


def test_the_chain_of_boto3_is_used_without_keys(
    moto_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-the-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    store = s3_store(moto_server)
    section = S3StoreSettings(kind="s3", bucket=store.place, endpoint_url=moto_server)
    found = parameters(make_store("x", section).sign_get("a", expires=HOUR).url)
    assert found["X-Amz-Credential"].startswith("from-the-environment/")


def test_no_credentials_at_all_are_told(
    moto_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    section = S3StoreSettings(kind="s3", bucket="b", endpoint_url=moto_server)
    with pytest.raises(StoreUnavailable, match=r"set access_key_id and secret_access_key in \[st"):
        make_store("x", section).sign_get("a", expires=HOUR)
    missing = section.model_copy(update={"profile": "nobody"})
    with pytest.raises(StoreUnavailable, match="no such profile"):
        make_store("x", missing).sign_get("a", expires=HOUR)


def test_a_wrong_secret_is_told_and_not_shown(swift_server: SwiftServer) -> None:
    good = swift_s3_store(swift_server)
    wrong = swift_s3_store(swift_server, bucket=good.place, secret_access_key=SecretStr("hunter2"))
    for attempt in (
        lambda: wrong.stat("a"),
        lambda: wrong.put("a", b"1"),
        lambda: wrong.open("a"),
        lambda: list(wrong.list()),
    ):
        with pytest.raises(StoreError, match=r"secret_access_key of .*is wrong") as caught:
            attempt()
        assert "hunter2" not in str(caught.value)
    assert request(wrong.sign_get("a", expires=HOUR)).status_code == 403


def test_a_signed_url_is_in_no_error(swift_server: SwiftServer) -> None:
    store = swift_s3_store(swift_server)
    store.put("a", b"1")
    wrong = swift_s3_store(swift_server, bucket=store.place)
    wrong._bucket_known = True  # straight to the signed request
    wrong._access._session.set_credentials("test:tester", "hunter2")
    with pytest.raises(StoreUnavailable) as caught:
        wrong.open("a")
    assert "SignatureDoesNotMatch" in str(caught.value)
    assert "X-Amz" not in str(caught.value)


# -- regions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def far_bucket(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of another region at an address that no store's settings name, as with AWS itself."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto_server)
    store = s3_store(moto_server)
    name = store.place + "-far"
    with closing(s3_client(moto_server)) as client:
        client.create_bucket(
            Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
        )
    return name


def keys(**options: Any) -> dict[str, Any]:
    return {
        "kind": "s3",
        "access_key_id": "testing",
        "secret_access_key": "x",
        "path_style": True,
        **options,
    }


def test_a_wrong_region_is_told_with_the_right_one(far_bucket: str) -> None:
    store = make_store("x", S3StoreSettings(**keys(bucket=far_bucket, region="us-east-1")))
    with pytest.raises(StoreUnavailable, match=r"eu-west-1.*correct `region`"):
        store.stat("a")


def test_a_region_that_nobody_stated_is_asked_for(far_bucket: str) -> None:
    store = make_store("x", S3StoreSettings(**keys(bucket=far_bucket)))
    assert "/eu-west-1/s3/" in parameters(store.sign_get("a", expires=HOUR).url)["X-Amz-Credential"]
    store.put("a", b"1")


@pytest.mark.parametrize(
    ("bucket", "region", "options", "expected"),
    [
        ("models", "eu-west-1", {}, "https://models.s3.eu-west-1.amazonaws.com/a%20b"),
        ("models", "us-east-1", {}, "https://models.s3.us-east-1.amazonaws.com/a%20b"),
        ("models", "cn-north-1", {}, "https://models.s3.cn-north-1.amazonaws.com.cn/a%20b"),
        ("my.models", "eu-west-1", {}, "https://s3.eu-west-1.amazonaws.com/my.models/a%20b"),
        (
            "models",
            "eu-west-1",
            {"path_style": True},
            "https://s3.eu-west-1.amazonaws.com/models/a%20b",
        ),
        ("models", "x", {"endpoint_url": "http://s3:9000"}, "http://s3:9000/models/a%20b"),
        (
            "models",
            "x",
            {"endpoint_url": "http://s3:9000", "path_style": False},
            "http://models.s3:9000/a%20b",
        ),
    ],
)
def test_a_bucket_is_addressed_in_its_region(
    bucket: str, region: str, options: dict[str, Any], expected: str
) -> None:
    values = {"path_style": None, **options}
    store = make_store("x", S3StoreSettings(**keys(bucket=bucket, region=region, **values)))
    assert store.sign_get("a b", expires=HOUR).url.partition("?")[0] == expected


# -- errors -----------------------------------------------------------------------------------------------------


def bare(endpoint: str, **options: Any) -> S3Store:
    section = S3StoreSettings(
        kind="s3",
        bucket="models",
        endpoint_url=endpoint,
        access_key_id="id",
        secret_access_key=SecretStr("secret"),
        **options,
    )
    return S3Store("x", section)


def refusing(status: int, code: str, *, namespace: str = "Error") -> Callable[[Any], None]:
    inner = f"<Code>{code}</Code><Message>words</Message><Region>eu-west-1</Region>"
    if namespace == "ErrorResponse":
        inner = f"<Error>{inner}</Error>"
    body = f"<{namespace}>{inner}</{namespace}>".encode()

    def answer(handler: Any) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("Content-Type", "application/xml")
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    return answer


def test_a_missing_bucket_is_not_an_empty_one(moto_server: str) -> None:
    store = s3_store(moto_server, bucket="nobody-made-this")
    for attempt in (
        lambda: store.stat("a"),
        lambda: list(store.list()),
        lambda: store.open("a"),
        lambda: store.put("a", b""),
        lambda: store.begin_parts("a", size=10**9),
    ):
        with pytest.raises(StoreUnavailable, match="there is no bucket 'nobody-made-this': make"):
            attempt()


def test_a_server_that_is_away_is_told() -> None:
    store = bare(f"http://127.0.0.1:{free_port()}", connect_timeout_seconds=1)
    with pytest.raises(StoreUnavailable, match=r"check endpoint_url in .*network"):
        store.stat("a")


@pytest.mark.parametrize(
    ("status", "code", "expected", "words"),
    [
        (400, "ExpiredToken", StoreUnavailable, "have run out: give fresh ones"),
        (403, "RequestTimeTooSkewed", StoreUnavailable, "clock of this machine"),
        (403, "InvalidAccessKeyId", StoreNotWritable, "access_key_id or secret_access_key"),
        (403, "AccessDenied", StoreNotWritable, r"docs/stores\.md lists the permissions"),
        (400, "AuthorizationHeaderMalformed", StoreUnavailable, r"its region is eu-west-1"),
        (507, "XMinioStorageFull", StoreFull, "free space"),
        (403, "QuotaExceeded", StoreFull, "quota"),
        (400, "KMS.NotFoundException", StoreNotWritable, "kms_key_id"),
        (412, "PreconditionFailed", StoreConflict, "never overwrite"),
        (409, "ConditionalRequestConflict", StoreConflict, "never overwrite"),
        (501, "NotImplemented", StoreError, "conditional_writes = false"),
        (404, "NoSuchBucket", StoreUnavailable, "make it"),
    ],
)
def test_every_refusal_of_a_write_says_what_to_do(
    status: int, code: str, expected: type[StoreError], words: str
) -> None:
    """Stands on a scripted server: no emulator gives all of these answers."""
    with scripted.serve() as server:
        server.answers["/models/a"] = [refusing(status, code)]
        store = bare(server.url(""), region="us-east-1")
        store._bucket_known = True
        with pytest.raises(StoreError, match=words) as caught:
            store.put("a", b"1")
    assert type(caught.value) is expected
    assert (
        "[stores.x]" in str(caught.value)
        or "docs/stores.md" in str(caught.value)
        or expected
        in (
            StoreConflict,
            StoreFull,
            StoreUnavailable,
        )
    )


def test_a_refused_look_is_told_in_words() -> None:
    """Answers to HEAD have no body; the reason is asked for otherwise."""
    with scripted.serve() as server:
        server.answers["/models/a"] = [refusing(400, "")]
        server.answers["/models"] = [refusing(400, "ExpiredToken")]
        store = bare(server.url(""), region="us-east-1")
        store._bucket_known = True
        with pytest.raises(StoreUnavailable, match="have run out"):
            store.stat("a")


def test_who_may_not_list_can_still_read(moto_server: str) -> None:
    with scripted.serve() as server:
        server.answers["/models"] = [refusing(403, "AccessDenied")]
        server.answers["/models/a"] = [scripted.content(b"content", ETag='"1"')]
        store = bare(server.url(""), region="us-east-1")
        with store.open("a") as file:
            assert file.read() == b"content"


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (501, "NotImplemented")])
def test_who_may_not_list_unfinished_uploads_still_wipes_the_object(
    status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    with scripted.serve() as server:
        server.answers["/models"] = [refusing(status, code)]
        server.answers["/models/a"] = [scripted.status(204)]
        bare(server.url(""), region="us-east-1").wipe("a")
        assert server.count("DELETE", "/models/a") == 1
    assert "does not list unfinished uploads" in caplog.text


def test_an_object_that_vanishes_is_missing(moto_server: str) -> None:
    store = s3_store(moto_server)
    with pytest.raises(StoreMissing, match="gone"):
        store.open("gone")
