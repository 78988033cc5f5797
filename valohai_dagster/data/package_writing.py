"""Writes one package: an uncompressed tar of datums, read from their stores and sent to another place as it is read.

A member has its datum's id as its name, whatever the file is called, and the same owner, mode and time as all others:
so the same files give the same package, and nothing in it can name a place outside of a directory. Every content is
compared with its record on the way. Memory does not depend on how much there is.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, cast

from valohai_agent.checksums import Hasher
from valohai_agent.package_files import BLOCK, footprint
from valohai_agent.protocol import Checksums
from valohai_dagster.data.datums import VERSION_CHARS, Datum, replaced, require_content
from valohai_dagster.errors import RefusedError, StoreError
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.registry import Stores

READ_AHEAD = 8  # small files that are read at the same time: each is a request of its own
CHUNK_BYTES = 1024 * 1024
SMALL_BYTES = CHUNK_BYTES
END = bytes(2 * BLOCK)  # of a tar


class Stopped(Exception):
    """Nobody wants the package any more."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A package that is stored. `checksums` of its files, by datum."""

    size: int
    sha256: str
    checksums: dict[str, Checksums]


def plan_packages(datums: Iterable[Datum], limit: int) -> list[list[Datum]]:
    """Packages of at most `limit` bytes, in the order of the files; a file that fits into none is left out."""
    planned: list[list[Datum]] = []
    room = 0
    for datum in datums:
        need = footprint(datum.size)
        if need + len(END) > limit:
            continue
        if need > room:
            planned.append([])
            room = limit - len(END)
        planned[-1].append(datum)
        room -= need
    return planned


def store_for(datums: Sequence[Datum], stores: Stores) -> str:
    """Where most of the bytes lie, since whoever reads those reaches it too; else the default store."""
    weights: dict[str, int] = {}
    for datum in datums:
        weights[datum.store] = weights.get(datum.store, 0) + datum.size
    heaviest = max(weights, key=lambda name: weights[name])
    return stores.default.name if stores[heaviest].readonly else heaviest


def write_package(
    datums: Sequence[Datum], stores: Stores, target: Store, key: str, *, stop: threading.Event
) -> Written:
    """Stores the package under a fresh key. Blocks.

    Raises `StoreError`, `RefusedError` for a content that is not what its record says, `Stopped`.
    """
    checksums: dict[str, Checksums] = {}
    with ThreadPoolExecutor(READ_AHEAD, "package") as pool:
        stream = _Stream(_tar(datums, stores, checksums, pool), stop)
        try:
            found = target.put(key, cast("BinaryIO", io.BufferedReader(stream, CHUNK_BYTES)))
        except Exception:
            if stream.error is not None:  # a driver's library may have put its own around it
                raise stream.error from None
            raise
        finally:
            stream.pieces.close()
    if found.size != stream.size:
        raise StoreError(
            f"the package {key!r} has {found.size} bytes in the store {target.name!r}, {stream.size} were sent",
            store=target.name,
        )
    return Written(size=stream.size, sha256=stream.digest.hexdigest(), checksums=checksums)


class _Stream(io.RawIOBase):
    """Pieces as a stream that is hashed while it is read."""

    def __init__(self, pieces: Generator[bytes, None, None], stop: threading.Event) -> None:
        super().__init__()
        self.pieces, self._stop = pieces, stop
        self._rest = memoryview(b"")
        self.size, self.digest = 0, hashlib.sha256()
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer).cast("B")  # pyright: ignore[reportArgumentType]
        while not self._rest:
            try:
                piece = self._next()
            except Exception as error:
                self.error = error
                raise
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def _next(self) -> bytes | None:
        if self._stop.is_set():
            raise Stopped
        piece = next(self.pieces, None)
        if piece is not None:
            self.size += len(piece)
            self.digest.update(piece)
        return piece


def _tar(
    datums: Sequence[Datum],
    stores: Stores,
    checksums: dict[str, Checksums],
    pool: ThreadPoolExecutor,
) -> Generator[bytes, None, None]:
    for datum, chunks in _read_ahead(datums, stores, pool):
        entry = tarfile.TarInfo(datum.id)
        entry.size = datum.size
        yield entry.tobuf(tarfile.GNU_FORMAT)
        hasher = _Check(datum)
        for chunk in chunks:
            yield hasher.seen(chunk)
        checksums[datum.id] = hasher.end()
        yield bytes(-datum.size % BLOCK)
    yield END


def _read_ahead(
    datums: Sequence[Datum], stores: Stores, pool: ThreadPoolExecutor
) -> Iterator[tuple[Datum, Iterable[bytes]]]:
    """Each with its content, the small ones of which have been read when their turn comes."""
    ahead: deque[tuple[Datum, Future[bytes] | None]] = deque()
    rest = iter(datums)

    def fill() -> None:
        while len(ahead) < READ_AHEAD and (datum := next(rest, None)) is not None:
            small = datum.size <= SMALL_BYTES
            ahead.append((datum, pool.submit(_whole, datum, stores) if small else None))

    try:
        fill()
        while ahead:
            datum, coming = ahead.popleft()
            yield datum, _chunks(datum, stores) if coming is None else [coming.result()]
            fill()
    finally:
        for _, coming in ahead:
            if coming is not None:
                coming.cancel()


def _whole(datum: Datum, stores: Stores) -> bytes:
    """One byte more than there should be tells that it is too long."""
    with _unchanged(datum, stores).open(datum.key) as source:
        return source.read(datum.size + 1)


def _chunks(datum: Datum, stores: Stores) -> Iterator[bytes]:
    with _unchanged(datum, stores).open(datum.key) as source:
        while chunk := source.read(CHUNK_BYTES):
            yield chunk


def _unchanged(datum: Datum, stores: Stores) -> Store:
    """The store of the datum. An adopted object without checksums must have the version that it had then."""
    require_content(datum)
    store, version = stores.get(datum.store), datum.trusted_version
    found = store.stat(datum.key) if version is not None else None
    if version is not None and found is not None and found.version[:VERSION_CHARS] != version:
        raise replaced(datum, f"its version is {found.version}, was {version}")
    return store


class _Check:
    """Compares a content with its record while it passes."""

    def __init__(self, datum: Datum) -> None:
        self._datum, self._hasher = datum, Hasher()

    def seen(self, chunk: bytes) -> bytes:
        self._hasher.update(chunk)
        if self._hasher.size > self._datum.size:
            raise self._wrong(f"more than the {self._datum.size} bytes of its record")
        return chunk

    def end(self) -> Checksums:
        datum, found = self._datum, self._hasher.checksums()
        if self._hasher.size != datum.size:
            raise self._wrong(f"{self._hasher.size} bytes, {datum.size} in its record")
        if datum.sha256 and found.sha256 != datum.sha256.lower():
            raise self._wrong(f"the sha256 {found.sha256}, {datum.sha256} in its record")
        return found

    def _wrong(self, what: str) -> RefusedError:
        datum = self._datum
        return RefusedError(
            f"{datum.uri} ({datum.name!r}) in the store {datum.store!r} has {what}; it was changed or damaged there"
        )
