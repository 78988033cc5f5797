"""What drivers of stores behind a network share: names, refusals, errors, and streams over signed requests.

A driver's own library is used where it does something; whole contents pass through here, by the very requests that
workers get, so that all of them are read and written alike and in constant memory.
"""

from __future__ import annotations

import io
import logging
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import BinaryIO, Protocol

import httpx

from valohai_agent.protocol import Transfer
from valohai_dagster.errors import (
    StoreBadKey,
    StoreConflict,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreNotWritable,
    StoreUnavailable,
)
from valohai_dagster.settings_stores import RemoteStoreSettings
from valohai_dagster.stores.base import ObjectStat
from valohai_dagster.stores.keys import check_key

CHUNK_BYTES = 1024 * 1024
READ_TRIES = 4  # connections that one content may take


class _WithoutCredentials(logging.Filter):
    """httpx tells the log of every request, address and all; users, passwords and queries may be credentials."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                value.copy_with(userinfo=b"", query=None, fragment=None)
                if isinstance(value, httpx.URL)
                else value
                for value in record.args
            )
        return True


logging.getLogger("httpx").addFilter(_WithoutCredentials())


class Readable(Protocol):
    """What is sent: anything that gives its bytes in order."""

    def read(self, count: int = -1, /) -> bytes: ...


class RemoteStore:
    """Base of the drivers. `scheme` and `place` make the URIs: `gs`, `bucket` is `gs://bucket/key`.

    `failures` are the errors of the driver's library; `status_of` says which HTTP status one stands for (None: there
    was no answer) and `code_of` what the service calls it.
    """

    kind: str
    scheme: str
    failures: tuple[type[Exception], ...] = ()

    def __init__(self, name: str, section: RemoteStoreSettings, *, place: str) -> None:
        self.name = name
        self.readonly = section.readonly
        self.place = place
        self._place_is_there = False
        self._timeout = httpx.Timeout(
            section.read_timeout_seconds, connect=section.connect_timeout_seconds
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.uri('')!r})"

    # -- names --------------------------------------------------------------------------------------------------

    def uri(self, key: str) -> str:
        return f"{self.scheme}://{self.place}/{key}"

    def key_of(self, uri: str) -> str | None:
        """Serves its own URIs and `store://<name>/<key>`, both as they stand."""
        for prefix in (self.uri(""), f"store://{self.name}/"):
            if uri.startswith(prefix):
                return uri[len(prefix) :]
        return None

    def check(self, key: str) -> str:
        return check_key(key, store=self.name)

    def listed(self, key: str) -> bool:
        """False for objects that other programs keep in the bucket and no key can name, such as `directory/`."""
        try:
            return bool(self.check(key))
        except StoreBadKey:
            return False

    def refuse_readonly(self) -> None:
        if self.readonly:
            raise StoreNotWritable(
                f"the store {self.name!r} is set readonly in [stores.{self.name}]", store=self.name
            )

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        raise NotImplementedError

    def delete(self, key: str) -> None:
        raise NotImplementedError

    def wipe(self, key: str) -> None:
        """For services that forget unfinished uploads by themselves."""
        self.delete(key)

    # -- errors -------------------------------------------------------------------------------------------------

    def status_of(self, error: Exception) -> int | None:
        raise NotImplementedError

    def code_of(self, error: Exception) -> str:
        """The service's own word for it; never text that may hold a URL or a signature."""
        return type(error).__name__

    def code_in(self, answer: httpx.Response) -> str:
        """The same, in the body of a refused request."""
        return ""

    @contextmanager
    def explained(self, what: str, *, writing: bool = False) -> Iterator[None]:
        """Turns the library's errors within into ours, which say what was tried and what to do."""
        if writing:
            self.refuse_readonly()
        try:
            yield
        except StoreError:
            raise
        except (*self.failures, httpx.HTTPError) as error:
            ours = isinstance(error, httpx.HTTPError)
            status = None if ours else self.status_of(error)
            code = type(error).__name__ if ours else self.code_of(error)
            raise self.failure(what, status, code, writing=writing) from error

    def failure(
        self, what: str, status: int | None, code: str = "", *, writing: bool = False
    ) -> StoreError:
        """Our error for an answer of that HTTP status; None: there was none."""
        told = f"HTTP {status} {code}".strip() if status else f"no answer ({code})"
        text = f"the store {self.name!r} ({self.uri('')}) cannot {what}: {told}"
        kind, advice = _meaning(status, writing=writing)
        section = f"[stores.{self.name}]"
        return kind(f"{text}; {advice.format(section=section)}", store=self.name)

    def require_place(self) -> None:
        """To be called when an object is missing: raises when its bucket or container is missing too.

        Such a store is not empty but misconfigured. Asked once; who may not list cannot tell and is believed.
        """
        if self._place_is_there:
            return
        try:
            next(iter(self.list()), None)
        except StoreError as error:
            cause = error.__cause__
            if not isinstance(cause, self.failures) or self.status_of(cause) not in (401, 403):
                raise
        self._place_is_there = True

    # -- contents over signed requests --------------------------------------------------------------------------

    def read(self, key: str, request: Callable[[], Transfer], *, offset: int = 0) -> BinaryIO:
        """The content from `offset` on; raises `StoreMissing`. A dropped connection is taken up where it broke."""
        return io.BufferedReader(_Reading(self, key, request, offset), CHUNK_BYTES)

    def send(self, transfer: Transfer, content: Readable | bytes, *, what: str) -> httpx.Response:
        """Writes the content by a signed request; a stream is sent as it is read. Raises for a refusal."""
        body = content if isinstance(content, bytes) else _chunks(content)
        with self.explained(what, writing=True), self.client() as client:
            answer = client.request(
                transfer.method, transfer.url, headers=transfer.headers, content=body
            )
        if answer.is_success:
            return answer
        raise self.failure(what, answer.status_code, self.code_in(answer), writing=True)

    def client(self) -> httpx.Client:
        return httpx.Client(timeout=self._timeout, verify=certificates())


def expiry(expires: timedelta) -> datetime:
    """When a request that is signed now runs out, in whole seconds."""
    return (datetime.now(timezone.utc) + expires).replace(microsecond=0)


def part_size(size: int, *, wanted: int, most_parts: int, multiple: int = 1024 * 1024) -> int:
    """Bytes of a part: `wanted`, or more where the file would have too many parts; a multiple of `multiple`."""
    needed = -(-size // most_parts)
    return max(wanted, -(-needed // multiple) * multiple)


def part_count(size: int, part_bytes: int) -> int:
    return max(1, -(-size // part_bytes))


def as_stream(content: BinaryIO | bytes) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else content


def known_size(content: BinaryIO | bytes) -> int | None:
    """Bytes from where the stream stands to its end; None when it cannot tell without being read."""
    if isinstance(content, bytes):
        return len(content)
    if not content.seekable():
        return None
    here = content.tell()
    end = content.seek(0, io.SEEK_END)
    content.seek(here)
    return max(0, end - here)


def _meaning(status: int | None, *, writing: bool) -> tuple[type[StoreError], str]:
    """What an HTTP status means for a store, and what to do about it."""
    if status in (401, 403):
        kind = StoreNotWritable if writing else StoreUnavailable
        return kind, "check the credentials in {section} and what they may do"
    if status in (409, 412) and writing:
        return StoreConflict, "stores never overwrite"
    if status == 404:
        return (
            StoreUnavailable,
            "there is no such bucket or container: make it, or correct its name in {section}",
        )
    if status in (413, 507):
        return StoreFull, "free space, raise its quota, or choose another store"
    if status is not None and status < 500 and status not in (408, 429):
        return (
            StoreError,
            "the request was not understood; check the address and names in {section}",
        )
    return StoreUnavailable, "check the address in {section} and the network, then try again"


@lru_cache(maxsize=1)
def certificates() -> ssl.SSLContext:
    """Reading all certificate authorities takes longer than most requests."""
    return httpx.create_ssl_context()


def _chunks(stream: Readable) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


class _Reading(io.RawIOBase):
    """An object that is being read, over as many connections as it takes."""

    def __init__(
        self, store: RemoteStore, key: str, request: Callable[[], Transfer], offset: int
    ) -> None:
        super().__init__()
        self._store, self._key, self._request = store, key, request
        self._position = offset
        self._version: str | None = None
        self._tries = READ_TRIES
        self._rest = b""
        self._client = store.client()
        self._answer: httpx.Response | None = None
        self._pieces: Iterator[bytes] = iter(())
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer).cast("B")  # pyright: ignore[reportArgumentType]
        while not self._rest:
            try:
                self._rest = next(self._pieces)
            except StopIteration:
                return 0
            except httpx.TransportError as error:
                self._reconnect(error)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._disconnect()
            self._client.close()
        super().close()

    @property
    def _what(self) -> str:
        return f"read {self._key!r}"

    def _reconnect(self, error: httpx.TransportError) -> None:
        self._tries -= 1
        self._disconnect()
        if self._tries <= 0:
            raise self._store.failure(self._what, None, type(error).__name__) from error
        self._connect()

    def _disconnect(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _connect(self) -> None:
        transfer = self._request()
        headers = {**transfer.headers, "Accept-Encoding": "identity"}
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
        request = self._client.build_request(transfer.method, transfer.url, headers=headers)
        with self._store.explained(self._what):
            answer = self._answer = self._client.send(request, stream=True)
        if answer.status_code == 416:
            self._pieces = iter(())
            return
        self._refuse(answer)
        self._pieces = answer.iter_raw(CHUNK_BYTES)
        if self._position and answer.status_code == 200:
            with self._store.explained(self._what):
                self._skip(self._position)

    def _refuse(self, answer: httpx.Response) -> None:
        status = answer.status_code
        if status == 404:
            self._store.require_place()
            raise StoreMissing(
                f"the store {self._store.name!r} has no object {self._key!r} "
                f"({self._store.uri(self._key)})",
                store=self._store.name,
            )
        if not answer.is_success:
            with self._store.explained(self._what):
                answer.read()
            raise self._store.failure(self._what, status, self._store.code_in(answer))
        version = answer.headers.get("ETag")
        if self._version is not None and version != self._version:
            raise StoreUnavailable(
                f"the object {self._key!r} of the store {self._store.name!r} was replaced while it was read; "
                "read it again",
                store=self._store.name,
            )
        self._version = version

    def _skip(self, count: int) -> None:
        """For a server that does not know ranges and began at the front."""
        while count > 0:
            piece = next(self._pieces, b"")
            if not piece:
                return
            self._rest = piece[count:]
            count -= len(piece)
