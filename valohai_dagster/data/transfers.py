"""Moving datums between this host and a store, hashed on the way (O-19)."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, BinaryIO

from valohai_agent.errors import (
    ChecksumMismatch,
    Conflict,
    DiskFull,
    NotFound,
    TransferError,
    Unreachable,
)
from valohai_agent.protocol import GRANTED_PARTS, Checksums, Parts, UploadGrant
from valohai_agent.transfer import Transferer, Transferred
from valohai_dagster.data.datums import Datum, new_id, replaced, require_content
from valohai_dagster.data.own_uploads import Noted
from valohai_dagster.errors import (
    RefusedError,
    StoreConflict,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreUnavailable,
)
from valohai_dagster.stores.base import JoiningStore, PartedUpload, Store
from valohai_dagster.stores.keys import check_key
from valohai_dagster.stores.registry import Stores

log = logging.getLogger(__name__)

LIFE = timedelta(hours=1)  # of a signed request; further ones are signed when it is not enough
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


class Mover:
    """Moves files between this host and stores by the agent's engine, with requests that the store itself signs.

    One for many files; safe to use from several threads. `stop` ends all that is going on.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self._engine = Transferer(cancelled=stop)

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(
        self,
        path: Path,
        store: Store,
        key: str,
        *,
        name: str,
        progress: Progress | None = None,
        noted: Noted | None = None,
    ) -> Transferred:
        """Writes a fresh object, in parts if the store takes large ones so; nothing is left of a failure.

        `noted`: the upload in the records, for what is left when this process dies.
        """
        size = path.stat().st_size
        upload = store.begin_parts(key, size=size)
        if upload is not None and noted is not None:
            noted.begun(upload, size)
        grant = UploadGrant(upload_id=key, transfer=store.sign_put(key, expires=LIFE, size=size))
        if upload is not None:
            grant = grant.model_copy(update={"parts": self._first_parts(store, key, upload, size)})

        def more(first: int, count: int) -> Parts:
            assert upload is not None
            if not count and isinstance(store, JoiningStore):
                store.join_parts(key, upload, size=size)
            return store.sign_parts(key, upload, range(first, first + count), expires=LIFE)

        try:
            return self._engine.upload(
                path, grant, name=name, progress=_told(progress, noted), more=more
            )
        except BaseException as error:
            if upload is not None:
                _quietly(store.abort_parts, key, upload)
            if not isinstance(error, Conflict):  # what is there is not ours
                _quietly(store.delete, key)
            elif noted is not None:
                noted.disown()
            if isinstance(error, TransferError):
                raise _explained(error, store) from error
            raise

    @staticmethod
    def _first_parts(store: Store, key: str, upload: PartedUpload, size: int) -> Parts:
        last = 1 if upload.style == "session" else max(1, -(-size // upload.part_bytes))
        numbers = range(1, min(last, GRANTED_PARTS) + 1)
        return store.sign_parts(key, upload, numbers, expires=LIFE)

    def fetch(
        self,
        store: Store,
        key: str,
        target: Path,
        *,
        name: str,
        expected: Checksums,
        size: int | None = None,
        progress: Progress | None = None,
    ) -> Transferred:
        """Writes `target` whole or not at all, replacing what is there, and compares checksums."""
        try:
            return self._engine.download(
                store.sign_get(key, expires=LIFE),
                target,
                name=name,
                expected=expected,
                size=size,
                progress=_by_difference(progress),
                renew=lambda: store.sign_get(key, expires=LIFE),
            )
        except TransferError as error:
            raise _explained(error, store) from error


def _quietly(undo: Callable[..., None], key: str, *arguments: Any) -> None:
    """A failure to clean up must not hide why there is something to clean up."""
    try:
        undo(key, *arguments)
    except StoreError as error:
        log.warning("%r may be left over: %s", key, error, extra={"action": "undo-upload"})


def store_file(
    path: Path,
    *,
    name: str,
    store: Store,
    project_id: str | None,
    now: datetime,
    mover: Mover,
    tags: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    properties: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    note: Callable[[str, str], Noted] | None = None,
) -> Datum:
    """Uploads one file under a fresh key; the datum is not recorded yet. Content first, so no record ever lies.

    `note` puts its id and key into the records, see `own_uploads`; whoever records the datum settles that. Without it
    nothing removes what is left when this process dies.
    """
    check_key(name)
    datum_id = new_id()
    key = f"data/{project_id or 'uploads'}/{datum_id}/{safe_name(name)}"
    try:
        found = path.stat()
        noted = note(datum_id, key) if note else None
        moved = mover.send(path, store, key, name=name, progress=progress, noted=noted)
    except OSError as error:
        raise RefusedError(f"cannot read {path}: {error.strerror}") from error
    return Datum(
        id=datum_id,
        name=name,
        size=moved.size,
        store=store.name,
        key=key,
        project_id=project_id,
        ctime=now,
        tags=list(dict.fromkeys(tags)),
        metadata=dict(metadata or {}),
        properties=dict(properties or {}),
        file_mtime=datetime.fromtimestamp(found.st_mtime, timezone.utc),
        file_ctime=datetime.fromtimestamp(found.st_ctime, timezone.utc),
        **moved.checksums.model_dump(),
    )


def fetch_datum(
    datum: Datum,
    target: Path,
    *,
    stores: Stores,
    mover: Mover,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the content to `target`, whole or not at all, and checks its checksums.

    Where those are unknown, the version that an adopted object had is compared. A file that is there with that content is left alone.
    """
    require_content(datum)
    if _is_same(target, datum):
        if progress is not None:
            progress(datum.size)
        return
    if target.exists() and not overwrite:
        raise RefusedError(
            f"{target} exists already and is something else; choose another place, or give --overwrite"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedError(f"cannot write {target}: {error.strerror}") from error
    _fetch_checked(datum, target, stores.get(datum.store), mover, progress)


def _fetch_checked(
    datum: Datum, target: Path, store: Store, mover: Mover, progress: Progress | None
) -> None:
    """An object that was adopted and replaced since is refused before anything is at `target`."""
    version = datum.trusted_version
    place = target if version is None else target.with_name(f".{datum.id}.part")
    values = {"expected": datum.checksums, "size": datum.size, "progress": progress}
    try:
        moved = mover.fetch(store, datum.key, place, name=f"{datum.uri} ({datum.name})", **values)
        if version is None:
            return
        if moved.version.contradicts(version):
            found = moved.version.like(version)
            raise replaced(datum, f"its version is {found}, was {version}")
        place.replace(target)
    except StoreError as error:
        if datum.adopted and isinstance(error.__cause__, ChecksumMismatch):
            raise replaced(datum, str(error.__cause__)) from error
        raise
    finally:
        if place != target:
            place.unlink(missing_ok=True)


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
    if datum.sha256 is None or not path.is_file() or path.stat().st_size != datum.size:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == datum.sha256


def _told(
    progress: Progress | None, noted: Noted | None
) -> Callable[[int, int | None], None] | None:
    """Both hear of the bytes that move."""
    tell = _by_difference(progress)
    if noted is None:
        return tell

    def both(done: int, total: int | None) -> None:
        noted.goes_on()
        if tell is not None:
            tell(done, total)

    return both


def _by_difference(progress: Progress | None) -> Callable[[int, int | None], None] | None:
    """The engine tells how much there is, several connections may tell it at once; a bar wants what is new."""
    if progress is None:
        return None
    told, lock = 0, threading.Lock()

    def tell(done: int, total: int | None) -> None:
        nonlocal told
        with lock:
            new, told = done - told, done
        progress(new)

    return tell


def _explained(error: TransferError, store: Store) -> StoreError:
    kind = _KINDS.get(type(error), StoreError)
    return kind(f"{error} (store {store.name!r})", store=store.name)


_KINDS: dict[type[TransferError], type[StoreError]] = {
    NotFound: StoreMissing,
    Conflict: StoreConflict,
    DiskFull: StoreFull,
    Unreachable: StoreUnavailable,
}
