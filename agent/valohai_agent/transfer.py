"""Moves one file by one signed request or many: http(s):// or file://, streaming, hashed on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from valohai_agent.local_files import (
    Shrunk,
    disk_errors,
    file_path,
    open_regular,
    put_file,
    require_space,
    source_errors,
)
from valohai_agent.protocol import Checksums, Transfer, UploadGrant
from valohai_agent.transfers import small
from valohai_agent.transfers.download import Download
from valohai_agent.transfers.hashing import ALGORITHMS, verify
from valohai_agent.transfers.lane import SMALL_BYTES
from valohai_agent.transfers.pace import MAX_CONNECTIONS, Progress, Shared, Transferred
from valohai_agent.transfers.parted import More, put_parts
from valohai_agent.transfers.pool import Pool
from valohai_agent.transfers.ranges import identity
from valohai_agent.transfers.retries import Temporary
from valohai_agent.transfers.small import SmallDownload, SmallUpload, is_small
from valohai_agent.transfers.upload import Source, put
from valohai_agent.transfers.wire import Patience

__all__ = [
    "PARALLEL_FILES",
    "SMALL_BYTES",
    "Progress",
    "SmallDownload",
    "SmallUpload",
    "Transferer",
    "Transferred",
    "is_small",
]

PARALLEL_FILES = 16  # that callers with many files do best to move at once
COPY_BYTES = 8 * 1024 * 1024
OpensFile = Callable[[], IO[bytes]]


class Transferer:
    """Downloads and uploads with one pool of connections; safe to use from several threads.

    Temporary troubles (no connection, time-outs, a connection that drips, 408, 425, 429, 5xx) are retried
    with jittered back-off until `attempts` tries in a row have brought nothing; `Retry-After` is honoured,
    and a download goes on where it broke off if the server can do that. Everything else fails at once with
    the subclass of TransferError that says what it was. `cancelled` ends waiting and moving early with
    Unreachable. Large files go by several connections, `max_connections` of all files together.
    `algorithms` are the checksums to compute. `waiting` hears, from any thread, what is tried again and when.
    """

    def __init__(
        self,
        *,
        attempts: int = 8,
        timeout: tuple[float, float] = (10.0, 60.0),
        sleep: Callable[[float], Any] | None = None,
        cancelled: threading.Event | None = None,
        algorithms: tuple[str, ...] = ALGORITHMS,
        max_connections: int = MAX_CONNECTIONS,
        patience: Patience | None = None,
        waiting: Callable[[str], None] = lambda text: None,
    ) -> None:
        cancelled = cancelled or threading.Event()
        pool = Pool(patience or Patience(connect_seconds=timeout[0], read_seconds=timeout[1]))
        self._shared = Shared(
            pool,
            attempts=attempts,
            sleep=sleep or cancelled.wait,
            cancelled=cancelled,
            algorithms=algorithms,
            max_connections=max_connections,
            waiting=waiting,
        )
        self._close = weakref.finalize(self, pool.close)

    def close(self) -> None:
        """Closes idle connections; happens by itself when the object is gone."""
        self._shared.pool.close()

    def download(
        self,
        transfer: Transfer,
        target: Path,
        *,
        name: str,
        expected: Checksums | None = None,
        size: int | None = None,
        progress: Progress | None = None,
        renew: Callable[[], Transfer] | None = None,
    ) -> Transferred:
        """Writes `target` atomically (temporary file beside it, then rename).

        `name` is what errors call the file: URLs carry signatures and are never shown. `renew` gives a
        fresh request when the URL has run out on the way.
        """
        partial = f"{target.parent}/.{uuid.uuid4().hex}.part"
        with self._shared.file(), disk_errors(name, target.parent):
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                if size is None or size > SMALL_BYTES:  # of a small one the write itself will tell
                    require_space(target.parent, size, name)
                if urlsplit(transfer.url).scheme == "file":
                    moved = self._copy_in(transfer, fd, name, progress)
                    verify(name, moved.size, moved.checksums, size, expected or Checksums())
                else:
                    moved = Download(
                        self._shared,
                        transfer,
                        fd,
                        name=name,
                        expected=expected,
                        size=size,
                        progress=progress,
                        renew=renew,
                    ).run()
                os.replace(partial, target)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
                raise
            finally:
                os.close(fd)
        return moved

    def upload(
        self,
        source: Path | OpensFile,
        grant: UploadGrant,
        *,
        name: str,
        progress: Progress | None = None,
        more: More | None = None,
    ) -> Transferred:
        """Sends `source` as the grant says; to `file://` it writes beside, syncs and links.

        Never overwrites: an existing target is a Conflict. `source` must be a regular file, or open one, and is
        refused when it changes meanwhile. `more` asks for further or fresh parts of a grant in parts.
        """
        with self._shared.file(), source_errors(name), self._source(source, name, progress) as file:
            if urlsplit(grant.transfer.url).scheme == "file":
                target = file_path(grant.transfer.url)
                put_file(lambda fd: self._copy(file, fd), target, name)
                return file.finish(None)
            if grant.parts is not None:
                return put_parts(file, grant.parts, more)
            return put(file, grant.transfer)

    def download_small(
        self, wanted: Iterable[SmallDownload]
    ) -> Iterator[tuple[SmallDownload, Transferred | None]]:
        """Many files at once, each as it ends; None for one that `download` shall fetch: nothing was retried here.

        When the transferer was cancelled, all that is left comes back so.
        """
        return small.download(self._shared, wanted)

    def upload_small(
        self, wanted: Iterable[SmallUpload]
    ) -> Iterator[tuple[SmallUpload, Transferred | None]]:
        """As `download_small`. A file that comes back undone may have arrived all the same, under its granted key."""
        return small.upload(self._shared, wanted)

    def etag(self, transfer: Transfer, *, name: str) -> str | None:
        """Identity of the content behind a URL, or None if the server does not tell.

        Strong ETag, else Last-Modified with the length; for `file://` inode, size and mtime.
        """
        if urlsplit(transfer.url).scheme == "file":
            with source_errors(name):
                status = file_path(transfer.url).stat()
            return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
        try:
            with self._shared.pool.request(
                "HEAD", transfer, check=self._shared.check, follow=True, name=name
            ) as answer:
                return identity(answer.headers) if answer.ok else None
        except Temporary as error:
            self._shared.waiting(f"{name}: {error} (when asked for its version)")
            return None

    @contextlib.contextmanager
    def _source(
        self, path: Path | OpensFile, name: str, progress: Progress | None
    ) -> Iterator[Source]:
        with open_regular(path) if isinstance(path, Path) else path() as opened:
            file = Source(self._shared, opened.fileno(), name=name, progress=progress)
            try:
                yield file
            finally:
                file.close()

    def _copy_in(
        self, transfer: Transfer, fd: int, name: str, progress: Progress | None
    ) -> Transferred:
        path = file_path(transfer.url)
        with source_errors(name), self._source(path, name, progress) as file:
            with disk_errors(name, path.parent):
                self._copy(file, fd)
            return dataclasses.replace(file.finish(None), version=file.version)

    def _copy(self, file: Source, fd: int) -> None:
        """Within the kernel where the file systems can do it."""
        position = 0
        while position < file.size:
            self._shared.check()
            count = os.sendfile(fd, file.fd, position, min(COPY_BYTES, file.size - position))
            if not count:
                raise Shrunk(file.size - position)
            position += count
            file.hash_until(position)
            file.count.add(count)
