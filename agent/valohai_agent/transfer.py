"""Moves one file by one signed request: http(s):// or file://, streaming, hashed on the way."""

from __future__ import annotations

import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import requests
import requests.adapters
import urllib3.exceptions

from valohai_agent.checksums import Hasher
from valohai_agent.errors import (
    ChecksumMismatch,
    Conflict,
    Denied,
    DiskFull,
    NotFound,
    Refused,
    TransferError,
    Unreachable,
)
from valohai_agent.local_files import (
    Shrunk,
    disk_errors,
    file_path,
    open_regular,
    put_file,
    require_space,
    source_errors,
)
from valohai_agent.protocol import Checksums, Transfer

CHUNK_BYTES = 1024 * 1024
BACK_OFF_SECONDS = 0.5  # first pause; doubles, times a random factor of 0.5..1.5
MAX_BACK_OFF_SECONDS = 30.0
PROGRESS_SECONDS = 0.25
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
STATUS_ERRORS: dict[int, type[TransferError]] = {
    401: Denied,
    403: Denied,
    404: NotFound,
    409: Conflict,
    410: NotFound,
    412: Conflict,
    507: DiskFull,
}

Progress = Callable[[int, "int | None"], None]
"""Called with bytes done and bytes expected, at most a few times a second."""


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """What went over the wire."""

    size: int
    checksums: Checksums
    etag: str | None = None


class Transferer:
    """Downloads and uploads with one connection pool; safe to use from several threads.

    Temporary troubles (no connection, time-outs, 408, 429, 5xx) are retried up to `attempts` times
    with jittered back-off, `Retry-After` is honoured, and a download goes on where it broke off if
    the server can do that. Everything else fails at once with the subclass of TransferError that
    says what it was. `cancelled` ends waiting and streaming early with Unreachable.
    """

    def __init__(
        self,
        *,
        attempts: int = 5,
        timeout: tuple[float, float] = (10.0, 60.0),
        sleep: Callable[[float], Any] | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        self._attempts = attempts
        self._timeout = timeout
        self._cancelled = cancelled or threading.Event()
        self._sleep = sleep or self._cancelled.wait
        self._session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=16)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def download(
        self,
        transfer: Transfer,
        target: Path,
        *,
        name: str,
        expected: Checksums | None = None,
        size: int | None = None,
        progress: Progress | None = None,
    ) -> Transferred:
        """Writes `target` atomically (temporary file beside it, then rename).

        `name` is what errors call the file: URLs carry signatures and are never shown.
        """
        job = _Download(name=name, expected=expected, size=size, progress=_paced(progress))
        partial = target.parent / f".{uuid.uuid4().hex}.part"
        try:
            with disk_errors(name, target.parent), partial.open("xb") as file:
                require_space(target.parent, size, name)
                self._retry(lambda: self._fetch(transfer, file, job), name)
            job.verify()
            with disk_errors(name, target.parent):
                os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        return Transferred(size=job.hasher.size, checksums=job.hasher.checksums(), etag=job.etag)

    def upload(
        self, source: Path, transfer: Transfer, *, name: str, progress: Progress | None = None
    ) -> Transferred:
        """Sends `source` with PUT; to `file://` it writes beside, syncs and links.

        Never overwrites: an existing target is a Conflict. `source` must be a regular file; its
        size when opened is what is sent.
        """
        with source_errors(name), open_regular(source) as file:
            size = os.fstat(file.fileno()).st_size
            if urlsplit(transfer.url).scheme == "file":
                reader = _HashingReader(file, size, _paced(progress), self._check)
                put_file(reader, file_path(transfer.url), name)
                return reader.result(None)
            return self._put(file, size, transfer, name, _paced(progress))

    def etag(self, transfer: Transfer, *, name: str) -> str | None:
        """Identity of the content behind a URL, or None if the server does not tell.

        Strong ETag, else Last-Modified with the length; for `file://` inode, size and mtime.
        """
        if urlsplit(transfer.url).scheme == "file":
            with source_errors(name):
                status = file_path(transfer.url).stat()
            return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
        try:
            response = self._request("HEAD", transfer, allow_redirects=True)
        except requests.RequestException:
            return None
        with response:
            return _identity(response.headers) if response.ok else None

    # -- download ----------------------------------------------------------------------------------
    def _fetch(self, transfer: Transfer, file: IO[bytes], job: _Download) -> None:
        if urlsplit(transfer.url).scheme == "file":
            job.restart(file)
            with source_errors(job.name), open_regular(file_path(transfer.url)) as source:
                job.total = os.fstat(source.fileno()).st_size
                while chunk := source.read(CHUNK_BYTES):
                    self._check()
                    job.take(chunk, file)
            return
        self._fetch_http(transfer, file, job)

    def _fetch_http(self, transfer: Transfer, file: IO[bytes], job: _Download) -> None:
        resume = {}
        if job.hasher.size and job.etag:
            resume = {"Range": f"bytes={job.hasher.size}-", "If-Range": job.etag}
        response = self._request(transfer.method, transfer, resume, stream=True)
        with response:
            if response.status_code != 206 or not resume:
                job.restart(file)
            if not response.ok or (response.status_code == 206 and not resume):
                raise _status_error(response, job.name)
            job.etag = _strong_etag(response.headers)
            job.total = _expected_total(response, job.hasher.size)
            for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
                self._check()
                job.take(chunk, file)
        if job.total is not None and job.hasher.size != job.total:
            raise _Temporary(f"only {job.hasher.size} of {job.total} bytes arrived")

    # -- upload ------------------------------------------------------------------------------------
    def _put(
        self, file: IO[bytes], size: int, transfer: Transfer, name: str, progress: Progress
    ) -> Transferred:
        tries = 0

        def send() -> Transferred:
            nonlocal tries
            tries += 1
            file.seek(0)
            reader = _HashingReader(file, size, progress, self._check)
            # requests would send an empty stream chunked, which object stores refuse
            body = reader if size else b""
            response = self._request(transfer.method, transfer, data=body, allow_redirects=False)
            with response:
                if response.status_code in (409, 412) and tries > 1:
                    # The key is fresh and ours alone: an earlier try arrived, only its answer was lost.
                    return reader.result(None)
                if not 200 <= response.status_code < 300:
                    raise _status_error(response, name)
                return reader.result(response.headers.get("ETag"))

        return self._retry(send, name)

    # -- common ------------------------------------------------------------------------------------
    def _request(
        self,
        method: str,
        transfer: Transfer,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> requests.Response:
        merged = {"Accept-Encoding": "identity", **transfer.headers, **(headers or {})}
        return self._session.request(
            method, transfer.url, headers=merged, timeout=self._timeout, **options
        )

    def _retry(self, action: Callable[[], Any], name: str) -> Any:
        reason = "nothing was tried"
        for attempt in range(1, self._attempts + 1):
            self._check()
            try:
                return action()
            except _Temporary as error:
                reason, pause = str(error), error.pause_seconds
            except requests.exceptions.InvalidURL as error:
                raise Refused(f"{name}: the URL is not valid") from error
            except requests.exceptions.SSLError as error:
                raise Unreachable(f"{name}: the TLS certificate was not accepted") from error
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                reason, pause = _connection_reason(error), None
            if attempt < self._attempts:
                self._sleep(_pause(attempt) if pause is None else pause)
        raise Unreachable(
            f"{name}: {reason} (tried {self._attempts} times). "
            "Check that the address can be reached from the worker, then launch again."
        )

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Unreachable("cancelled")


class _Temporary(Exception):
    """A failure worth another try, with the pause the server asked for."""

    def __init__(self, reason: str, pause_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.pause_seconds = pause_seconds


class _Download:
    """State of one download across its tries."""

    def __init__(
        self, *, name: str, expected: Checksums | None, size: int | None, progress: Progress
    ) -> None:
        self.name = name
        self.expected = expected or Checksums()
        self.size = size
        self.total: int | None = size
        self.etag: str | None = None
        self.hasher = Hasher()
        self._progress = progress

    def restart(self, file: IO[bytes]) -> None:
        file.seek(0)
        file.truncate()
        self.hasher = Hasher()

    def take(self, chunk: bytes, file: IO[bytes]) -> None:
        with disk_errors(self.name, Path(file.name).parent):
            file.write(chunk)
            file.flush()
        self.hasher.update(chunk)
        self._progress(self.hasher.size, self.total)

    def verify(self) -> None:
        if self.size is not None and self.hasher.size != self.size:
            raise ChecksumMismatch(
                f"{self.name}: has {self.hasher.size} bytes, expected {self.size}. "
                "The source changed since it was recorded; use the new version explicitly."
            )
        actual = self.hasher.checksums()
        for kind in ("md5", "sha1", "sha256"):
            wanted, found = getattr(self.expected, kind), getattr(actual, kind)
            if wanted and wanted.lower() != found:
                raise ChecksumMismatch(
                    f"{self.name}: has {kind} {found}, expected {wanted}. "
                    "The source changed or was damaged on the way."
                )


class _HashingReader:
    """What requests reads a request body from: bounded, hashing, and telling how far it is."""

    def __init__(
        self, file: IO[bytes], size: int, progress: Progress, check: Callable[[], None]
    ) -> None:
        self._file = file
        self._size = size
        self._progress = progress
        self._check = check
        self._hasher = Hasher()

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self.read(CHUNK_BYTES):
            yield chunk

    def read(self, amount: int = -1) -> bytes:
        self._check()
        left = self._size - self._hasher.size
        chunk = self._file.read(min(left, CHUNK_BYTES if amount < 0 else amount))
        if not chunk and left:
            raise Shrunk(f"the file became shorter while it was uploaded ({left} bytes missing)")
        self._hasher.update(chunk)
        self._progress(self._hasher.size, self._size)
        return chunk

    def result(self, etag: str | None) -> Transferred:
        return Transferred(size=self._hasher.size, checksums=self._hasher.checksums(), etag=etag)


def _status_error(response: requests.Response, name: str) -> Exception:
    status = response.status_code
    host = urlsplit(response.url).hostname
    words = f"HTTP {status} {response.reason or ''}".strip() + f" from {host}"
    if status in RETRY_STATUS:
        return _Temporary(words, _retry_after(response.headers))
    kind = STATUS_ERRORS.get(status, Refused)
    return kind(f"{name}: {words}")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, min(seconds, MAX_BACK_OFF_SECONDS))


def _expected_total(response: requests.Response, offset: int) -> int | None:
    length = response.headers.get("Content-Length", "")
    if not length.isdigit():
        return None
    return int(length) + (offset if response.status_code == 206 else 0)


def _identity(headers: Mapping[str, str]) -> str | None:
    etag = _strong_etag(headers)
    if etag:
        return etag
    modified = headers.get("Last-Modified")
    return f"{modified}|{headers.get('Content-Length', '')}" if modified else None


def _strong_etag(headers: Mapping[str, str]) -> str | None:
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else None


def _connection_reason(error: Exception) -> str:
    """Words without the URL, which may carry a signature or a password."""
    if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError)):
        return "no answer within the time limit"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy cannot be reached"
    if isinstance(error, (requests.ConnectionError, urllib3.exceptions.ProtocolError)):
        return "the connection cannot be made or broke off"
    return type(error).__name__


def _pause(attempt: int) -> float:
    longest = min(MAX_BACK_OFF_SECONDS, BACK_OFF_SECONDS * 2 ** (attempt - 1))
    return longest * random.uniform(0.5, 1.5)  # noqa: S311 - spreads load, protects nothing


def _paced(progress: Progress | None) -> Progress:
    """Passes on at most one call per PROGRESS_SECONDS, and the last one."""
    if progress is None:
        return lambda done, total: None
    last = 0.0

    def report(done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS or done == total:
            last = now
            progress(done, total)

    return report
