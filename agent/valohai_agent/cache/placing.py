"""Copies files as cheaply as the file system can."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import IO

PIECE_BYTES = 256 * 1024 * 1024
_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


def copy_file(source: IO[bytes], target: Path) -> None:
    """Writes a new file with the rest of `source`; the kernel copies, and shares blocks where it can.

    Nothing is left of `target` when it fails. Raises OSError.
    """
    with target.open("xb") as file:
        try:
            if not _copied_by_kernel(source, file):
                shutil.copyfileobj(source, file, 1024 * 1024)
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def _copied_by_kernel(source: IO[bytes], file: IO[bytes]) -> bool:
    """False when the kernel cannot, with nothing copied."""
    copied = 0
    if not hasattr(os, "copy_file_range"):
        return False
    while True:
        try:
            count = os.copy_file_range(source.fileno(), file.fileno(), PIECE_BYTES)
        except OSError as error:
            if copied == 0 and error.errno in _CANNOT:
                return False
            raise
        if count == 0:
            return copied > 0 or os.fstat(source.fileno()).st_size == 0
        copied += count
