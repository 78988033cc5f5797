"""Small files as errands of a lane: held in memory, moved by one request each."""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import urlsplit

from valohai_agent.errors import Refused
from valohai_agent.protocol import Checksums, Transfer, UploadGrant
from valohai_agent.transfers.hashing import Digests, verify
from valohai_agent.transfers.lane import SMALL_BYTES, Errand, Lane
from valohai_agent.transfers.pace import Shared, Transferred
from valohai_agent.transfers.ranges import strong_etag
from valohai_agent.transfers.upload import Source
from valohai_agent.transfers.versions import version_of_answer

E = TypeVar("E", bound=Errand)
_OURS = uuid.uuid4().hex
_numbers = itertools.count()  # of partial files; several threads may take one at the same moment


@dataclass(frozen=True, kw_only=True, eq=False)
class SmallDownload:
    """What `Transferer.download` would be asked for. `size` is a demand, as is what `expected` has."""

    transfer: Transfer
    target: Path
    name: str
    expected: Checksums | None = None
    size: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SmallUpload:
    """What `Transferer.upload` would be asked for."""

    opens: Callable[[], IO[bytes]]
    grant: UploadGrant
    name: str


def is_small(transfer: Transfer, size: int | None) -> bool:
    """Whether a file of that size goes by a lane: of `download_small`, or of `upload_small`."""
    is_remote = urlsplit(transfer.url).scheme in ("http", "https")
    return is_remote and size is not None and size <= SMALL_BYTES


def download(
    shared: Shared, wanted: Iterable[SmallDownload]
) -> Iterator[tuple[SmallDownload, Transferred | None]]:
    for errand, moved in _run(shared, [_Download(shared, one) for one in wanted]):
        yield errand.wanted, moved


def upload(
    shared: Shared, wanted: Iterable[SmallUpload]
) -> Iterator[tuple[SmallUpload, Transferred | None]]:
    for errand, moved in _run(shared, [_Upload(shared, one) for one in wanted]):
        yield errand.wanted, moved


def _run(shared: Shared, errands: Sequence[E]) -> Iterator[tuple[E, Transferred | None]]:
    try:
        lane = Lane[E](shared)
    except OSError:  # no descriptors left for one
        yield from ((errand, None) for errand in errands)
        return
    yield from lane.run(errands)


class _Download:
    def __init__(self, shared: Shared, wanted: SmallDownload) -> None:
        self.wanted, self.name = wanted, wanted.name
        self.method, self.transfer = wanted.transfer.method, wanted.transfer
        self._shared = shared

    def body(self) -> bytes | None:
        return None

    def answered(
        self, status: int, headers: Mapping[str, str], content: memoryview
    ) -> Transferred | None:
        """The target appears when it is whole and right."""
        wanted, size = self.wanted, len(content)
        if status != 200 or headers.get("content-length") != str(size):
            return None
        digests = Digests(self._shared.algorithms)
        digests.update(content)
        found = digests.checksums()
        verify(self.name, size, found, wanted.size, wanted.expected or Checksums())
        _write(wanted.target, content)
        return Transferred(
            size=size,
            checksums=found,
            etag=strong_etag(headers),
            version=version_of_answer(headers, size),
        )

    def close(self) -> None:
        return None


class _Upload:
    def __init__(self, shared: Shared, wanted: SmallUpload) -> None:
        self.wanted, self.name = wanted, wanted.name
        self.method, self.transfer = wanted.grant.transfer.method, wanted.grant.transfer
        self._shared = shared
        self._file: IO[bytes] | None = None
        self._source: Source | None = None
        self._body = b""

    def body(self) -> bytes | None:
        if self._source is None:
            self.close()
            self._file = self.wanted.opens()
            if os.fstat(self._file.fileno()).st_size > SMALL_BYTES:
                raise Refused(f"{self.name}: the file has grown")
            source = Source(self._shared, self._file.fileno(), name=self.name, progress=None)
            source.require_granted_size(self.transfer)
            self._source, self._body = source, source.small()
        return self._body

    def answered(
        self, status: int, headers: Mapping[str, str], content: memoryview
    ) -> Transferred | None:
        assert self._source is not None
        return self._source.finish(headers.get("etag"))

    def close(self) -> None:
        self._source, self._body = None, b""  # the errand may be kept for long
        if self._file is not None:
            self._file.close()
            self._file = None


def _write(target: Path, content: memoryview) -> None:
    partial = target.parent / f".{_OURS}-{os.getpid()}-{next(_numbers)}.part"
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            while content:
                content = content[os.write(fd, content) :]
        finally:
            os.close(fd)
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
