"""Reads and writes local files for transfers, with errors in words."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from valohai_agent.errors import Conflict, Denied, DiskFull, NotFound, Refused


class Shrunk(OSError):
    """The source of an upload changed under our hands."""

    def __init__(self, missing: int) -> None:
        super().__init__(
            errno.EIO, f"the file became shorter while it was uploaded ({missing} bytes missing)"
        )


def file_path(url: str) -> Path:
    """The path of a `file://` URL; a host other than localhost is refused."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise Refused(f"file:// URL with the host {parts.netloc!r} cannot be opened")
    return Path(unquote(parts.path, errors="surrogateescape"))


def is_disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def put_file(write: Callable[[int], None], target: Path, name: str) -> None:
    """Writes beside the target, syncs, then links: readers see all or nothing, and never a change."""
    partial = target.parent / f".{uuid.uuid4().hex}.part"
    with disk_errors(name, target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                write(file.fileno())
                os.fsync(file.fileno())
            try:
                os.link(partial, target)
            except FileExistsError as error:
                raise Conflict(f"{name}: the store holds this key already") from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()
        _sync_directory(target.parent)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_regular(path: Path) -> IO[bytes]:
    """Opens without waiting for the other end of a FIFO, and refuses everything but regular files.

    Follows links, as a `file://` input may be one; what a command has written is opened by `beneath.Place`.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(fd, "rb")


@contextlib.contextmanager
def disk_errors(name: str, directory: Path) -> Iterator[None]:
    """Turns errors of the writing side into words."""
    try:
        yield
    except Shrunk:
        raise
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(_full(name, directory)) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Denied(f"{name}: {directory} is not writable ({error.strerror})") from error
        raise Refused(f"{name}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def source_errors(name: str) -> Iterator[None]:
    """Turns errors of the reading side into words."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{name}: the file does not exist") from error
    except PermissionError as error:
        raise Denied(f"{name}: the file cannot be read ({error.strerror})") from error
    except OSError as error:
        raise Refused(f"{name}: cannot be read ({error.strerror or error})") from error


def require_space(directory: Path, size: int | None, name: str) -> None:
    if size is not None and shutil.disk_usage(directory).free < size:
        raise DiskFull(_full(name, directory, size))


def _full(name: str, directory: Path, size: int | None = None) -> str:
    try:
        free = f"{shutil.disk_usage(directory).free} bytes are free"
    except OSError:
        free = "free space is unknown"
    need = f", {size} are needed" if size is not None else ""
    return (
        f"{name}: the disk that holds {directory} is full ({free}{need}). "
        "Free space there or use a machine with a larger disk."
    )
