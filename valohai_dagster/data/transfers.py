"""Moving datums between this host and a store, hashed on the way (O-19)."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, cast

from valohai_agent.protocol import Checksums
from valohai_dagster.data.datums import Datum, new_id, require_content
from valohai_dagster.errors import RefusedError, StoreError
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.keys import check_key
from valohai_dagster.stores.registry import Stores

CHUNK_BYTES = 1024 * 1024
Progress = Callable[[int], None]  # gets the number of further bytes


class HashingReader:
    """Passes a stream through, counting and hashing what is read."""

    def __init__(self, source: BinaryIO, progress: Progress | None = None) -> None:
        self._source = source
        self._progress = progress
        self._digests = {
            name: hashlib.new(name, usedforsecurity=False) for name in ("md5", "sha1", "sha256")
        }
        self.size = 0

    def read(self, amount: int = -1) -> bytes:
        chunk = self._source.read(amount)
        self.size += len(chunk)
        for digest in self._digests.values():
            digest.update(chunk)
        if self._progress is not None:
            self._progress(len(chunk))
        return chunk

    def checksums(self) -> Checksums:
        return Checksums(**{name: digest.hexdigest() for name, digest in self._digests.items()})


def store_file(
    path: Path,
    *,
    name: str,
    store: Store,
    project_id: str | None,
    now: datetime,
    tags: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    properties: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Datum:
    """Uploads one file under a fresh key; the datum is not recorded yet. Content first, so no record ever lies."""
    check_key(name)
    datum_id = new_id()
    key = f"data/{project_id or 'uploads'}/{datum_id}/{safe_name(name)}"
    try:
        with path.open("rb") as file:
            reader = HashingReader(file, progress)
            store.put(key, cast("BinaryIO", reader))  # stores only call read()
            found = os.fstat(file.fileno())
    except OSError as error:
        raise RefusedError(f"cannot read {path}: {error.strerror}") from error
    return Datum(
        id=datum_id,
        name=name,
        size=reader.size,
        store=store.name,
        key=key,
        project_id=project_id,
        ctime=now,
        tags=list(dict.fromkeys(tags)),
        metadata=dict(metadata or {}),
        properties=dict(properties or {}),
        file_mtime=datetime.fromtimestamp(found.st_mtime, timezone.utc),
        file_ctime=datetime.fromtimestamp(found.st_ctime, timezone.utc),
        **reader.checksums().model_dump(),
    )


def fetch_datum(
    datum: Datum,
    target: Path,
    *,
    stores: Stores,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the content to `target`, whole or not at all, and checks its sha256.

    A file that is there with that content is left alone.
    """
    require_content(datum)
    if target.is_file() and _is_same(target, datum):
        if progress is not None:
            progress(datum.size)
        return
    if target.exists() and not overwrite:
        raise RefusedError(
            f"{target} exists already and is something else; choose another --output, or give --overwrite"
        )
    temporary = target.with_name(f".{target.name[:200]}.{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with stores.get(datum.store).open(datum.key) as source, temporary.open("xb") as sink:
            reader = HashingReader(source, progress)
            while chunk := reader.read(CHUNK_BYTES):
                sink.write(chunk)
        _verify(datum, reader)
        temporary.replace(target)
    except OSError as error:
        raise RefusedError(f"cannot write {target}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def local_path(directory: Path, datum: Datum) -> Path:
    """Where a download of the datum goes; refuses names that would leave the directory."""
    return directory / check_key(datum.name)


def safe_name(name: str) -> str:
    """The base name as far as it is harmless in keys and URLs; the datum keeps the original."""
    base = "".join(
        c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name.rsplit("/", 1)[-1]
    )
    return base.lstrip(".-")[-100:] or "file"


def _is_same(path: Path, datum: Datum) -> bool:
    if datum.sha256 is None or path.stat().st_size != datum.size:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == datum.sha256


def _verify(datum: Datum, reader: HashingReader) -> None:
    found = reader.checksums().sha256
    if datum.sha256 is not None and found != datum.sha256:
        raise StoreError(
            f"{datum.uri} ({datum.name}): the content in the store {datum.store!r} is damaged: sha256 {found}, "
            f"recorded {datum.sha256}",
            store=datum.store,
        )
