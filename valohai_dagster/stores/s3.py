"""S3 and servers that speak it: presigned requests, uploads in parts, conditional writes.

`If-None-Match: *` is signed into every write, so that the server itself refuses to overwrite. Signing is done here
(`sigv4.py`), everything else by botocore.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any, BinaryIO

import httpx
from botocore.exceptions import BotoCoreError, ClientError

from valohai_agent.protocol import Parts, Transfer
from valohai_dagster.errors import StoreBadKey, StoreConflict, StoreError, StoreMissing
from valohai_dagster.settings_stores import MIB, S3StoreSettings
from valohai_dagster.stores import s3_errors
from valohai_dagster.stores.base import ObjectStat, PartedUpload
from valohai_dagster.stores.remote import RemoteStore, as_stream, part_size
from valohai_dagster.stores.s3_access import S3Access
from valohai_dagster.stores.s3_errors import code_of

log = logging.getLogger(__name__)

MAX_EXPIRY = timedelta(days=7)  # of a presigned URL
MAX_KEY_BYTES = 1024
MAX_PARTS = 10_000
MAX_PART_BYTES = 5120 * MIB
OPEN_EXPIRY = timedelta(hours=1)
SENDING = 4  # parts of one `put` on their way at once; bounds its memory
GROWTH = 1000  # parts after which those of a stream of unknown length get larger
_ONCE = {"If-None-Match": "*"}
_SSE = "x-amz-server-side-encryption"


class S3Store(RemoteStore):
    """One bucket. Versions are ETags, which listings and workers see as well; old versions of keys are not kept here.

    In a bucket with versioning, `delete` leaves the content to the bucket's lifecycle rules.
    """

    kind = "s3"
    scheme = "s3"
    failures = (BotoCoreError, ClientError)

    def __init__(self, name: str, section: S3StoreSettings) -> None:
        super().__init__(name, section, place=section.bucket)
        self._section = section
        self._access = S3Access(name, section)
        self._lock = threading.Lock()
        self._region_known = section.endpoint_url is not None
        self._bucket_known = False
        kms = "aws:kms" if section.kms_key_id else None
        self._encryption = section.encryption or kms

    # -- signed requests ----------------------------------------------------------------------------------------

    def sign_get(self, key: str, *, expires: timedelta) -> Transfer:
        self.check(key)
        with self.explained(f"sign a request for {key!r}"):
            return self._batch(expires).transfer("GET", key)

    def sign_put(self, key: str, *, expires: timedelta, size: int | None = None) -> Transfer:
        """Fails when the object exists (O-02); asks for the encryption that the settings name (E-48).

        A known size is signed too: the server refuses a body of another length.
        """
        self.check(key)
        with self.explained(f"sign an upload of {key!r}", writing=True):
            length = {} if size is None else {"Content-Length": str(size)}
            headers = {**self._condition, **self._encryption_headers, **length}
            return self._batch(expires).transfer("PUT", key, headers=headers)

    def begin_parts(self, key: str, *, size: int) -> PartedUpload | None:
        self.check(key)
        with self.explained(f"begin an upload of {key!r}", writing=True):
            if size <= self._section.part_bytes:
                return None
            self._be_ready()
            answer = self._client.create_multipart_upload(
                Bucket=self.place, Key=key, **self._encryption_arguments
            )
        part_bytes = part_size(size, wanted=self._section.part_bytes, most_parts=MAX_PARTS)
        return PartedUpload(style="s3", part_bytes=part_bytes, token=answer["UploadId"])

    def sign_parts(
        self, key: str, upload: PartedUpload, numbers: Sequence[int], *, expires: timedelta
    ) -> Parts:
        self.check(key)
        named = {"uploadId": upload.token}
        with self.explained(f"sign an upload of {key!r}", writing=True):
            batch = self._batch(expires)
            parts = {
                number: batch.transfer("PUT", key, query={**named, "partNumber": str(number)})
                for number in numbers
            }
            finish = batch.transfer("POST", key, query=named, headers=self._condition)
        return Parts(style="s3", part_bytes=upload.part_bytes, parts=parts, finish=finish)

    def abort_parts(self, key: str, upload: PartedUpload) -> None:
        self.check(key)
        with self.explained(f"give up the upload of {key!r}", writing=True):
            try:
                self._client.abort_multipart_upload(
                    Bucket=self.place, Key=key, UploadId=upload.token
                )
            except ClientError as error:
                if self.status_of(error) != 404 or code_of(error) == "NoSuchBucket":
                    raise

    # -- the control plane itself -------------------------------------------------------------------------------

    def stat(self, key: str) -> ObjectStat | None:
        self.check(key)
        with self.explained(f"look at {key!r}"):
            self._be_ready()
            try:
                found = self._client.head_object(Bucket=self.place, Key=key)
            except ClientError as error:
                if self.status_of(error) == 404:
                    return None
                self._probe()  # answers to HEAD have no words; if it is not about this object, this has
                raise
        return _describe(key, found["ContentLength"], found)

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        with self.explained(f"list {prefix!r}"):
            self._be_ready()
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.place, Prefix=prefix
            )
            for page in pages:
                for found in page.get("Contents", ()):
                    if self.listed(found["Key"]):
                        yield _describe(found["Key"], found["Size"], found)

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        self.check(key)
        with self.explained(f"read {key!r}"):
            self._be_ready()
        return self.read(key, lambda: self.sign_get(key, expires=OPEN_EXPIRY), offset=offset)

    def put(self, key: str, content: BinaryIO | bytes) -> ObjectStat:
        """In constant memory, whatever the size: at most some parts of it are held at a time."""
        self.check(key)
        stream = as_stream(content)
        with self.explained(f"write {key!r}", writing=True):
            self._be_ready()
            if not self._section.conditional_writes and self.stat(key) is not None:
                raise StoreConflict(
                    f"the store {self.name!r} has an object {key!r}; stores never overwrite",
                    store=self.name,
                )
            first = _read_fully(stream, self._section.part_bytes)
            if len(first) < self._section.part_bytes:
                self._client.put_object(
                    Bucket=self.place,
                    Key=key,
                    Body=first,
                    **self._condition_arguments,
                    **self._encryption_arguments,
                )
            else:
                self._put_parts(key, first, stream)
            found = self.stat(key)
        if found is None:
            raise StoreMissing(
                f"the object {key!r} was deleted from the store {self.name!r} right after it was written",
                store=self.name,
            )
        return found

    def delete(self, key: str) -> None:
        self.check(key)
        with self.explained(f"delete {key!r}", writing=True):
            self._client.delete_object(Bucket=self.place, Key=key)

    def wipe(self, key: str) -> None:
        """The uploads first: what is aborted can no longer be joined to an object."""
        self.check(key)
        with self.explained(f"look for unfinished uploads of {key!r}"):
            tokens = list(self._begun(key))
        for token in tokens:
            self.abort_parts(key, PartedUpload(style="s3", part_bytes=0, token=token))
        self.delete(key)

    def _begun(self, key: str) -> Iterator[str]:
        """Ids of the uploads in parts of just this key."""
        pages = self._client.get_paginator("list_multipart_uploads")
        try:
            for page in pages.paginate(Bucket=self.place, Prefix=key):
                found = page.get("Uploads", ())
                yield from (upload["UploadId"] for upload in found if upload["Key"] == key)
        except ClientError as error:
            # A server that cannot list them, or credentials that may not: rules of the bucket are left.
            if self.status_of(error) not in (403, 405, 501):
                raise
            text = "the store %r does not list unfinished uploads (%s); those that nobody knows of stay"
            log.warning(text, self.name, self.code_of(error), extra={"action": "wipe"})

    def check(self, key: str) -> str:
        if len(super().check(key).encode()) > MAX_KEY_BYTES:
            raise StoreBadKey(
                f"the key {key[:200]!r} in the store {self.name!r} is refused: S3 takes at most {MAX_KEY_BYTES} bytes",
                store=self.name,
            )
        return key

    # -- errors -------------------------------------------------------------------------------------------------

    def status_of(self, error: Exception) -> int | None:
        if not isinstance(error, ClientError):
            return None
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")

    def code_of(self, error: Exception) -> str:
        return code_of(error)

    def code_in(self, answer: httpx.Response) -> str:
        return s3_errors.code_in(answer.text)

    def failure(
        self, what: str, status: int | None, code: str = "", *, writing: bool = False
    ) -> StoreError:
        meaning = s3_errors.meaning_of(code)
        if meaning is None:
            return super().failure(what, status, code, writing=writing)
        kind = meaning.writing if writing else meaning.reading
        advice = meaning.advice.format(section=f"[stores.{self.name}]", bucket=self.place)
        text = f"the store {self.name!r} ({self.uri('')}) cannot {what}: {code}; {advice}"
        return kind(text, store=self.name)

    # -- the bucket ---------------------------------------------------------------------------------------------

    @property
    def _client(self) -> Any:
        return self._access.client

    def require_place(self) -> None:
        """Known from the first request on."""

    def _be_ready(self) -> None:
        """Once per store, before its first request: a bucket that is missing is told as such ever after."""
        if not self._bucket_known:
            self._find_region()
            self._probe()
            self._bucket_known = True

    def _probe(self) -> None:
        """Raises what is wrong with the bucket or the credentials, other than that these may not list."""
        try:
            self._client.list_objects_v2(Bucket=self.place, MaxKeys=1)
        except ClientError as error:
            if code_of(error) != "AccessDenied":
                raise

    def _find_region(self) -> None:
        """AWS says where a bucket lies even to strangers. botocore would follow silently; signed URLs cannot."""
        with self._lock:
            if self._region_known:
                return
            try:
                answer = self._client.head_bucket(Bucket=self.place)
            except ClientError as error:
                answer = error.response
            found = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            region = found.get("x-amz-bucket-region")
            if region and region != self._access.region:
                if self._access.states_region:
                    code = f"PermanentRedirect (its region is {region})"
                    raise self.failure("use the bucket", 301, code)
                self._access.region_found(region)
            self._region_known = True

    # -- signing ------------------------------------------------------------------------------------------------

    def _batch(self, expires: timedelta) -> _Batch:
        if not self._region_known and not self._access.states_region:
            self._find_region()
        now = datetime.now(timezone.utc)
        signing = self._access.signing()
        ends = now + min(expires, MAX_EXPIRY)
        if signing.ends is not None and signing.ends < ends:
            ends = signing.ends
        seconds = int((ends - now).total_seconds())
        if seconds < 1:
            raise self.failure("sign requests", None, "ExpiredToken")
        return _Batch(signing.signer, now.replace(microsecond=0), seconds)

    @property
    def _condition(self) -> Mapping[str, str]:
        return _ONCE if self._section.conditional_writes else {}

    @property
    def _condition_arguments(self) -> dict[str, str]:
        return {"IfNoneMatch": "*"} if self._section.conditional_writes else {}

    @property
    def _encryption_headers(self) -> dict[str, str]:
        if self._encryption is None:
            return {}
        key = self._section.kms_key_id
        return {_SSE: self._encryption, **({f"{_SSE}-aws-kms-key-id": key} if key else {})}

    @property
    def _encryption_arguments(self) -> dict[str, str]:
        if self._encryption is None:
            return {}
        key = self._section.kms_key_id
        return {"ServerSideEncryption": self._encryption, **({"SSEKMSKeyId": key} if key else {})}

    # -- large contents -----------------------------------------------------------------------------------------

    def _put_parts(self, key: str, first: bytes, stream: BinaryIO) -> None:
        where = {"Bucket": self.place, "Key": key}
        begun = self._client.create_multipart_upload(**where, **self._encryption_arguments)
        where["UploadId"] = begun["UploadId"]
        try:
            self._client.complete_multipart_upload(
                **where,
                MultipartUpload={"Parts": self._send_parts(where, first, stream)},
                **self._condition_arguments,
            )
        except BaseException:
            with suppress(ClientError, BotoCoreError):  # the first error is the one to tell
                self._client.abort_multipart_upload(**where)
            raise

    def _send_parts(self, where: dict[str, str], first: bytes, stream: BinaryIO) -> Sequence[Any]:
        def send(number: int, part: bytes) -> dict[str, Any]:
            answer = self._client.upload_part(**where, PartNumber=number, Body=part)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        part, number = first, 1
        futures: deque[Future[dict[str, Any]]] = deque()
        pending: set[Future[dict[str, Any]]] = set()
        with ThreadPoolExecutor(SENDING, thread_name_prefix=f"put-{self.name}") as pool:
            while part:
                futures.append(pool.submit(send, number, part))
                pending.add(futures[-1])
                if len(pending) >= SENDING:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    if any(future.exception() for future in done):
                        break
                number += 1
                grown = self._section.part_bytes * (1 + number // GROWTH)
                part = _read_fully(stream, min(grown, MAX_PART_BYTES))
        return [future.result() for future in futures]


class _Batch:
    """Signs at one moment for one end."""

    def __init__(self, signer: Any, now: datetime, seconds: int) -> None:
        self._signer, self._now, self._seconds = signer, now, seconds
        self._ends = now + timedelta(seconds=seconds)

    def transfer(
        self,
        method: Any,
        key: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Transfer:
        url = self._signer.url(
            method, key, now=self._now, seconds=self._seconds, query=query, headers=headers
        )
        return Transfer(url=url, method=method, headers=dict(headers or {}), expires_at=self._ends)


def _describe(key: str, size: int, found: Mapping[str, Any]) -> ObjectStat:
    """Times in whole seconds: only listings are finer."""
    return ObjectStat(
        key=key,
        size=size,
        version=found["ETag"].strip('"'),
        mtime=found["LastModified"].astimezone(timezone.utc).replace(microsecond=0),
    )


def _read_fully(stream: BinaryIO, size: int) -> bytes:
    """`size` bytes, fewer only at the end; streams may give less at a time than asked."""
    pieces: list[bytes] = []
    while size > 0 and (piece := stream.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
