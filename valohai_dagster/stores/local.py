"""A directory as a store, shared by the control plane and the workers on this host (or by a network mount).

A write goes to a temporary file in the same directory, is flushed to disk, and takes its final name by `link`,
which fails if the name is taken: nothing is ever overwritten, and a reader never sees half a file. Workers do the
same with a `file://` grant. Names of unfinished files match `TEMPORARY`; listings leave them out.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from valohai_agent.protocol import Parts, Transfer
from valohai_dagster.errors import (
    StoreBadKey,
    StoreConflict,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreNotWritable,
    StoreUnavailable,
)
from valohai_dagster.stores.base import ObjectStat, PartedUpload
from valohai_dagster.stores.keys import check_key

TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.part")  # the agent's uploads use the same
CHUNK_BYTES = 1024 * 1024
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}


class LocalStore:
    """`root` is made at the first write; a store that is only read must exist."""

    kind = "local"

    def __init__(self, name: str, root: Path, *, readonly: bool = False) -> None:
        self.name = name
        self.root = Path(os.path.abspath(root))
        self.readonly = readonly

    def sign_get(self, key: str, *, expires: timedelta) -> Transfer:
        """A file URL; `expires` does not apply, the operating system's permissions do."""
        return Transfer(url=self._path(key).as_uri())

    def sign_put(self, key: str, *, expires: timedelta, size: int | None = None) -> Transfer:
        """Also makes the directory and checks space, so that a store that cannot be written is known now."""
        path = self._path(key)
        with self._explained(f"write {key!r}"):
            self._refuse_readonly()
            _make_directory(path.parent)
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))
            if size is not None and size > shutil.disk_usage(path.parent).free:
                raise OSError(errno.ENOSPC, f"{size} bytes do not fit")
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        return Transfer(url=path.as_uri(), method="PUT")

    def begin_parts(self, key: str, *, size: int) -> None:
        """Files are written whole, whatever their size."""

    def sign_parts(
        self, key: str, upload: PartedUpload, numbers: Sequence[int], *, expires: timedelta
    ) -> Parts:
        raise StoreError(f"the store {self.name!r} takes no uploads in parts", store=self.name)

    def abort_parts(self, key: str, upload: PartedUpload) -> None:
        return None

    def stat(self, key: str) -> ObjectStat | None:
        path = self._path(key)
        with self._explained(f"look at {key!r}"):
            try:
                found = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                self._require_root()
                return None
            return _describe(key, found) if path.is_file() else None

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        """Symbolic links to files are listed, links to directories are not entered."""
        base = prefix.rpartition("/")[0]
        with self._explained(f"list {prefix!r}"):
            start = self._path(base) if base else self.root
            if not start.is_dir():
                self._require_root()
                return
            for path in _walk(start):
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and (found := self._listed(key)):
                    yield found

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        path = self._path(key)
        with self._explained(f"read {key!r}"):
            try:
                file = path.open("rb")
                file.seek(offset)
                return file
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                self._require_root()
                raise StoreMissing(
                    f"the store {self.name!r} has no object {key!r} ({path})", store=self.name
                ) from None

    def put(self, key: str, content: BinaryIO | bytes) -> ObjectStat:
        path = self._path(key)
        source = BytesIO(content) if isinstance(content, bytes) else content
        with self._explained(f"write {key!r}"):
            self._refuse_readonly()
            _make_directory(path.parent)
            temporary = path.parent / f".{uuid.uuid4().hex}.part"
            try:
                _write_durably(temporary, source)
                os.link(temporary, path)
            finally:
                with suppress(OSError):
                    temporary.unlink()
            _flush_directory(path.parent)
            return _describe(key, path.stat())

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._explained(f"delete {key!r}"):
            self._refuse_readonly()
            with suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
            if path.parent != self.root:
                with suppress(OSError):
                    path.parent.rmdir()  # only the object's own directory: others may be writing in those above

    def wipe(self, key: str) -> None:
        """With what a writer that died has left beside the key, so only for keys with a directory of their own."""
        self.delete(key)
        directory = self._path(key).parent
        with self._explained(f"tidy up beside {key!r}"):
            self._refuse_readonly()
            with suppress(FileNotFoundError, NotADirectoryError):
                for entry in list(os.scandir(directory)):
                    if TEMPORARY.fullmatch(entry.name):
                        Path(entry.path).unlink(missing_ok=True)
            if directory != self.root:
                with suppress(OSError):
                    directory.rmdir()

    def uri(self, key: str) -> str:
        return f"store://{self.name}/{key}"

    def key_of(self, uri: str) -> str | None:
        """Serves `store://<name>/<key>` as it stands, and percent-decoded `file://` URLs below its directory."""
        if uri.startswith(f"store://{self.name}/"):
            return uri[len(f"store://{self.name}/") :]
        if not uri.startswith("file:///"):
            return None
        path = unquote(uri[len("file://") :])
        root = self.root.as_posix().rstrip("/") + "/"
        return path[len(root) :] if path.startswith(root) else None

    def _path(self, key: str) -> Path:
        """Where the object lies; a link that leads out of the store is refused like a bad key."""
        path = self.root / check_key(key, store=self.name)
        if path.parent != self.root or path.is_symlink():
            inside = os.path.realpath(self.root)
            if os.path.commonpath([inside, os.path.realpath(path)]) != inside:
                raise StoreBadKey(
                    f"the key {key[:200]!r} leads out of the store {self.name!r} through a symbolic link",
                    store=self.name,
                )
        return path

    def _listed(self, key: str) -> ObjectStat | None:
        """None for names that no key can have and for links that leave the store."""
        try:
            return self.stat(key)
        except StoreBadKey:
            return None

    def _refuse_readonly(self) -> None:
        if self.readonly:
            raise StoreNotWritable(
                f"the store {self.name!r} is set readonly in [stores.{self.name}]", store=self.name
            )

    def _require_root(self) -> None:
        """A missing root of a read-only store is a mount that is away, not an empty store."""
        if self.readonly and not self.root.is_dir():
            raise StoreUnavailable(
                f"the directory {self.root} of the store {self.name!r} does not exist; is its mount missing?",
                store=self.name,
            )

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            raise self._explain(what, error) from error

    def _explain(self, what: str, error: OSError) -> StoreError:
        text = f"the store {self.name!r} ({self.root}) cannot {what}: {error.strerror or error}"
        if error.errno == errno.EEXIST:
            return StoreConflict(f"{text}; stores never overwrite", store=self.name)
        if error.errno in _FULL:
            return StoreFull(f"{text}; free space, or choose another store", store=self.name)
        if error.errno in _REFUSED:
            hint = f"check the owner and mode of the directory, or the path in [stores.{self.name}]"
            return StoreNotWritable(
                f"{text}; {hint}. `valohai-dagster doctor` checks it", store=self.name
            )
        return StoreUnavailable(text, store=self.name)


def _walk(directory: Path) -> Iterator[Path]:
    """All files below, in key order: a directory sorts as its name with a slash."""
    entries = [entry for entry in os.scandir(directory) if not TEMPORARY.fullmatch(entry.name)]
    named = [
        (entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name, entry)
        for entry in entries
    ]
    for name, entry in sorted(named, key=lambda pair: os.fsencode(pair[0])):
        if name.endswith("/"):
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None


def _describe(key: str, found: os.stat_result) -> ObjectStat:
    return ObjectStat(
        key=key,
        size=found.st_size,
        version=f"{found.st_size}-{found.st_mtime_ns}",
        mtime=datetime.fromtimestamp(found.st_mtime, timezone.utc),
    )


def _write_durably(path: Path, source: BinaryIO) -> None:
    with path.open("xb") as target:
        shutil.copyfileobj(source, target, CHUNK_BYTES)
        target.flush()
        os.fsync(target.fileno())


def _flush_directory(directory: Path) -> None:
    """Makes the new name survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
