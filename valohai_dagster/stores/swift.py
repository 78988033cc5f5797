"""OpenStack Swift: temporary URLs, and large objects of segments whose manifest the control plane writes.

Workers get temporary URLs only. No temporary URL can write a manifest (the server takes the query and the headers for it
away), so `join_parts` does it once all segments are there. Segments lie in a container of their own; where the key of
temporary URLs belongs to one container, they lie in that one, below `SEGMENTS`, because such a key opens no other.

Swift looks whether an object exists before it takes a new one, not at the same time: of two writers of one key at the
same moment both may succeed, and the later one's content stays. Keys of uploads are random, so no two share one.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO
from urllib.parse import quote

from keystoneauth1 import exceptions as keystone_errors

from valohai_agent.protocol import Parts, Transfer
from valohai_dagster.errors import StoreConflict, StoreError, StoreMissing
from valohai_dagster.settings_stores import SwiftStoreSettings
from valohai_dagster.stores.base import ObjectStat, PartedUpload
from valohai_dagster.stores.remote import (
    RemoteStore,
    as_stream,
    expiry,
    known_size,
    part_count,
    part_size,
)
from valohai_dagster.stores.swift_account import SwiftAccount

SEGMENTS = ".segments/"
MAX_SEGMENTS = 1000  # what a manifest may hold unless the operator allows more
PAGE = 1000
FRESH = {"If-None-Match": "*"}  # refused when the object exists (O-02)
OWN_EXPIRY = timedelta(hours=6)  # of requests that the control plane signs for itself


class SwiftStore(RemoteStore):
    """One container. Versions are ETags."""

    kind = "swift"
    scheme = "swift"
    failures = (keystone_errors.ClientException,)

    def __init__(self, name: str, section: SwiftStoreSettings) -> None:
        project = section.project or section.project_id or ""
        super().__init__(name, section, place=f"{project}/{section.container}")
        self._section = section
        self._account = SwiftAccount(name, section)
        self._container = section.container
        self._lock = threading.Lock()
        self._segment_container: str | None = None

    # -- signed requests ----------------------------------------------------------------------------------------

    def sign_get(self, key: str, *, expires: timedelta) -> Transfer:
        self.check(key)
        return self._signed("GET", self._container, key, expires)

    def sign_put(self, key: str, *, expires: timedelta, size: int | None = None) -> Transfer:
        self.check(key)
        return self._signed("PUT", self._container, key, expires)

    def begin_parts(self, key: str, *, size: int) -> PartedUpload | None:
        """Segments get a prefix of their own, so that nothing of another upload is ever taken for one of them."""
        self.check(key)
        wanted = self._section.part_bytes
        if size <= wanted:
            return None
        with self.explained(f"begin an upload of {key!r}", writing=True):
            self._segments_in()
        part_bytes = part_size(size, wanted=wanted, most_parts=MAX_SEGMENTS)
        token = f"{_mark(key)}-{uuid.uuid4().hex}"
        return PartedUpload(style="swift", part_bytes=part_bytes, token=token)

    def sign_parts(
        self, key: str, upload: PartedUpload, numbers: Sequence[int], *, expires: timedelta
    ) -> Parts:
        self.check(key)
        with self.explained(f"sign parts of {key!r}", writing=True):
            container = self._segments_in()
        parts = {
            number: self._signed("PUT", container, _segment(upload, number), expires, fresh=False)
            for number in numbers
        }
        return Parts(style="swift", part_bytes=upload.part_bytes, parts=parts)

    def join_parts(self, key: str, upload: PartedUpload, *, size: int) -> ObjectStat:
        """Writes the manifest; the server checks that each segment is there and as long as it must be."""
        return self._join(key, upload, _lengths(size, upload.part_bytes))

    def abort_parts(self, key: str, upload: PartedUpload) -> None:
        self.check(key)
        with self.explained(f"give up the upload of {key!r}", writing=True):
            container = self._segments_in()
            if self._is_joined(key, container, upload):
                return
            for found in list(self._listing(container, _segment(upload))):
                self._call("DELETE", container, found["name"], allowed=(404,))

    # -- the control plane itself -------------------------------------------------------------------------------

    def stat(self, key: str) -> ObjectStat | None:
        self.check(key)
        with self.explained(f"look at {key!r}"):
            answer = self._call("HEAD", self._container, key, allowed=(404,))
        if answer.status_code == 404:
            self.require_place()
            return None
        return _from_headers(key, answer.headers)

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        """Without the segments of large objects."""
        with self.explained(f"list {prefix!r}"):
            for found in self._listing(self._container, prefix):
                name = found["name"]
                if self.listed(name) and not name.startswith(SEGMENTS):
                    yield _from_listing(found)

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        self.check(key)
        return self.read(key, lambda: self.sign_get(key, expires=OWN_EXPIRY), offset=offset)

    def put(self, key: str, content: BinaryIO | bytes) -> ObjectStat:
        """Content that is too long for one object, or of unknown length, is stored in segments."""
        self.check(key)
        size, limit = known_size(content), self._section.part_bytes
        what = f"write {key!r}"
        if size is None or size > limit:
            return self._put_large(key, as_stream(content), size)
        self.send(self.sign_put(key, expires=OWN_EXPIRY), content, what=what)
        return self._there(key)

    def delete(self, key: str) -> None:
        """A large object goes with its segments."""
        self.check(key)
        with self.explained(f"delete {key!r}", writing=True):
            answer = self._call("HEAD", self._container, key, allowed=(404,))
            if answer.status_code == 404:
                return
            if answer.headers.get("X-Static-Large-Object", "").lower() != "true":
                self._call("DELETE", self._container, key, allowed=(404,))
                return
            answer = self._call(
                "DELETE",
                self._container,
                key,
                query="multipart-manifest=delete",
                headers={"Accept": "application/json"},
                allowed=(404,),
            )
            status = str(answer.json().get("Response Status", "")) if answer.content else ""
            if status and not status.startswith(("200", "404")):
                raise self.failure(f"delete {key!r}", int(status[:3]), writing=True)

    def wipe(self, key: str) -> None:
        """Segments that a manifest names go with it; what is left then belongs to nothing."""
        self.delete(key)
        with self.explained(f"look for unfinished uploads of {key!r}", writing=True):
            container = self._segments_in()
            for found in list(self._listing(container, f"{SEGMENTS}{_mark(key)}-")):
                self._call("DELETE", container, found["name"], allowed=(404,))

    # -- large objects ------------------------------------------------------------------------------------------

    def _put_large(self, key: str, stream: BinaryIO, size: int | None) -> ObjectStat:
        upload = self.begin_parts(key, size=max(size or 0, self._section.part_bytes + 1))
        assert upload is not None
        lengths: list[int] = []
        try:
            while True:
                part = _Limited(stream, upload.part_bytes)
                number = len(lengths) + 1
                parts = self.sign_parts(key, upload, [number], expires=OWN_EXPIRY)
                self.send(parts.parts[number], part, what=f"write {key!r}")
                if part.taken:
                    lengths.append(part.taken)
                else:  # the content ended with the segment before
                    self._call("DELETE", self._segments_in(), _segment(upload, number))
                if part.taken < upload.part_bytes:
                    break
            return self._join(key, upload, lengths)
        except BaseException:
            self.abort_parts(key, upload)
            raise

    def _join(self, key: str, upload: PartedUpload, lengths: Sequence[int]) -> ObjectStat:
        self.check(key)
        what = f"join the parts of {key!r}"
        with self.explained(what, writing=True):
            container = self._segments_in()
            manifest = [
                {"path": f"/{container}/{_segment(upload, number)}", "size_bytes": length}
                for number, length in enumerate(lengths, 1)
            ]
            if not manifest:  # a large object cannot be empty
                self.send(self.sign_put(key, expires=OWN_EXPIRY), b"", what=what)
                return self._there(key)
            answer = self._call(
                "PUT",
                self._container,
                key,
                query="multipart-manifest=put",
                headers={"Content-Type": "application/octet-stream", **FRESH},
                json=manifest,
                allowed=(400, 409, 412),
            )
            if answer.status_code in (409, 412) and not self._is_joined(key, container, upload):
                raise StoreConflict(
                    f"the store {self.name!r} has an object {key!r} already; stores never overwrite",
                    store=self.name,
                )
        if answer.status_code == 400:
            raise StoreMissing(
                f"the store {self.name!r} cannot {what}: of {len(lengths)} segments some are missing or not as "
                "long as they must be; upload the file again",
                store=self.name,
            )
        return self._there(key)

    def _is_joined(self, key: str, container: str, upload: PartedUpload) -> bool:
        """Whether the object is there and made of the segments of this upload."""
        answer = self._call(
            "GET", self._container, key, query="multipart-manifest=get", allowed=(404,), stream=True
        )
        with answer:
            is_manifest = answer.headers.get("X-Static-Large-Object", "").lower() == "true"
            if answer.status_code == 404 or not is_manifest:
                return False
            return answer.json()[0]["name"] == f"/{container}/{_segment(upload, 1)}"

    def _segments_in(self) -> str:
        """The container of segments; made when missing."""
        with self._lock:
            if self._segment_container is None:
                self._segment_container = self._find_segment_container()
            return self._segment_container

    def _find_segment_container(self) -> str:
        chosen = self._section.segment_container
        if chosen is None and not self._account.key(self._container).whole_account:
            return self._container
        container = chosen or f"{self._container}_segments"
        if self._call("HEAD", container, allowed=(404,)).status_code == 404:
            self._call("PUT", container)
        return container

    # -- requests -----------------------------------------------------------------------------------------------

    def status_of(self, error: Exception) -> int | None:
        return getattr(error, "http_status", None) or None

    def _signed(
        self, method: Any, container: str, key: str, expires: timedelta, *, fresh: bool = True
    ) -> Transfer:
        until = expiry(expires)
        with self.explained(f"sign a request for {key!r}", writing=method == "PUT"):
            url = self._account.temp_url(
                method, container, key, until=int(until.timestamp()), key_of=self._container
            )
        headers = FRESH if method == "PUT" and fresh else {}
        return Transfer(url=url, method=method, headers=dict(headers), expires_at=until)

    def _call(
        self,
        method: str,
        container: str,
        key: str = "",
        *,
        query: str = "",
        allowed: Sequence[int] = (),
        **options: Any,
    ) -> Any:
        """The server's answer; raises for a refusal that is not among those allowed."""
        path = f"/{quote(container, safe='')}" + (f"/{quote(key)}" if key else "")
        answer = self._account.call(method, f"{path}?{query}" if query else path, **options)
        if answer.status_code >= 400 and answer.status_code not in allowed:
            raise keystone_errors.HttpError(http_status=answer.status_code)
        return answer

    def _listing(self, container: str, prefix: str) -> Iterator[Any]:
        marker = ""
        while True:
            words = {"format": "json", "limit": str(PAGE), "prefix": prefix, "marker": marker}
            query = "&".join(f"{word}={quote(value, safe='')}" for word, value in words.items())
            page = self._call("GET", container, query=query).json()
            yield from page
            if len(page) < PAGE:
                return
            marker = page[-1]["name"]

    def _there(self, key: str) -> ObjectStat:
        found = self.stat(key)
        if found is None:
            raise StoreError(
                f"the object {key!r} vanished from the store {self.name!r} right after it was written",
                store=self.name,
            )
        return found


class _Limited:
    """The next `limit` bytes of a stream as a stream of their own."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream, self._limit = stream, limit
        self.taken = 0

    def read(self, count: int = -1, /) -> bytes:
        left = self._limit - self.taken
        piece = self._stream.read(left if count < 0 else min(count, left)) if left else b""
        self.taken += len(piece)
        return piece


def _segment(upload: PartedUpload, number: int | None = None) -> str:
    prefix = f"{SEGMENTS}{upload.token}/"
    return prefix if number is None else f"{prefix}{number:08d}"


def _mark(key: str) -> str:
    """What the names of all segments of uploads of the key begin with."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _lengths(size: int, part_bytes: int) -> list[int]:
    count = part_count(size, part_bytes)
    return [part_bytes] * (count - 1) + [size - part_bytes * (count - 1)]


def _from_headers(key: str, headers: Any) -> ObjectStat:
    stamp = headers.get("X-Timestamp")
    changed = (
        datetime.fromtimestamp(float(stamp), timezone.utc)
        if stamp
        else parsedate_to_datetime(headers["Last-Modified"])
    )
    return ObjectStat(
        key=key,
        size=int(headers["Content-Length"]),
        version=headers["ETag"].strip('"'),
        mtime=changed,
    )


def _from_listing(found: Any) -> ObjectStat:
    changed = datetime.fromisoformat(found["last_modified"]).replace(tzinfo=timezone.utc)
    version = str(found.get("slo_etag") or found["hash"]).strip('"')
    return ObjectStat(key=found["name"], size=int(found["bytes"]), version=version, mtime=changed)
