"""Copies single files out of an ended container."""

from __future__ import annotations

import io
import os
import posixpath
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from valohai_agent.errors import OutputError
from valohai_agent.runtimes.base import Elsewhere

# The bits of Go's file mode, in which the daemon answers.
_DIRECTORY, _LINK, _FIFO, _SOCKET = 1 << 31, 1 << 27, 1 << 25, 1 << 24
_DEVICE, _IRREGULAR = 1 << 26, 1 << 19


def copy_out(api: Any, container_id: str, path: str, target: Path) -> Elsewhere | str | None:
    """`Running.copy_out` for containers. The daemon follows links of the directories within the container's own root,
    so no link reaches a file of the host; the content streams, and only the disk bounds it."""
    from docker.errors import APIError

    try:
        stream, status = api.get_archive(container_id, path)
    except APIError as error:
        if error.status_code == 404:
            return "which does not exist in the container"
        return f"which cannot be read from the container: {str(error.explanation or error).strip()}"
    try:
        mode = int(status["mode"])
        if mode & _LINK:
            return _elsewhere(path, str(status.get("linkTarget") or ""))
        reason = _irregular(mode)
        if reason is None:
            _save(stream, path, target)
        return reason
    finally:
        stream.close()


def _elsewhere(path: str, target: str) -> Elsewhere | str:
    """A link's target; relative ones start at the link's directory."""
    if not target:
        return "which is a link to nothing"
    return Elsewhere(path=posixpath.normpath(posixpath.join(posixpath.dirname(path), target)))


def _irregular(mode: int) -> str | None:
    if mode & _DIRECTORY:
        return "a directory of the container"
    if mode & (_FIFO | _SOCKET | _DEVICE | _IRREGULAR):
        return "which is no regular file"
    return None


def _save(stream: Iterator[bytes], path: str, target: Path) -> None:
    try:
        with tarfile.open(fileobj=io.BufferedReader(_Chunks(stream)), mode="r|") as archive:
            member = archive.next()
            content = archive.extractfile(member) if member is not None else None
            if member is None or content is None:
                raise OutputError(f"{path} could not be copied out of the container: no content")
            with open(target, "wb") as file:
                shutil.copyfileobj(content, file, 1024 * 1024)
            os.utime(target, (member.mtime, member.mtime))
    except (OSError, tarfile.TarError) as error:
        target.unlink(missing_ok=True)
        raise OutputError(
            f"{path} could not be copied out of the container to {target.parent}: {error}. Free space "
            "on the worker, or write the file below /valohai/outputs"
        ) from error


class _Chunks(io.RawIOBase):
    """A stream of chunks as a file to read once."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = chunk
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size
