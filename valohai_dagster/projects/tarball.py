"""Deterministic gzip tarballs: equal trees give equal bytes, whoever packs them and whenever.

Entries are sorted, without times and owners, and keep of the mode only whether a file is executable. S-33 notes that
touching a file changes the identifier elsewhere; here it does not.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from valohai_dagster.errors import ProjectError

COMPRESSION = 6


@dataclass(frozen=True, kw_only=True)
class Tarball:
    path: Path
    sha256: str
    size: int


class _Hashing:
    """A writer that counts and hashes what passes."""

    def __init__(self, file: IO[bytes], limit: int | None) -> None:
        self.file = file
        self.limit = limit
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        if self.limit is not None and self.size > self.limit:
            raise ProjectError(
                f"the packed project is larger than {self.limit // 10**6:,} MB (S-32): "
                "list data directories in .vhignore and bring data in as inputs"
            )
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_tarball(
    root: Path, files: Sequence[str], directory: Path, *, limit: int | None = None
) -> Tarball:
    """Pack `files` (relative, `/` as separator) into `directory/<sha256>.tar.gz`; `limit` in packed bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="new-", suffix=".tar.gz", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            out = _Hashing(file, limit)
            _write(root, sorted(files, key=os.fsencode), out)
        final = directory / f"{out.digest.hexdigest()}.tar.gz"
        os.replace(name, final)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Tarball(path=final, sha256=out.digest.hexdigest(), size=out.size)


def _write(root: Path, files: Sequence[str], out: _Hashing) -> None:
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0, compresslevel=COMPRESSION) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):  # fmt: skip
        for name in files:
            try:
                _add(tar, root, name)
            except OSError as error:
                raise ProjectError(
                    f"cannot pack {name!r} of {root}: {error.strerror or error}"
                ) from error


def _add(tar: tarfile.TarFile, root: Path, name: str) -> None:
    path = root / name
    info = tarfile.TarInfo(name)
    info.mtime = 0
    if path.is_symlink():
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, os.readlink(path), 0o777
        tar.addfile(info)
        return
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        info.size = status.st_size
        info.mode = 0o755 if status.st_mode & 0o100 else 0o644
        tar.addfile(info, file)
