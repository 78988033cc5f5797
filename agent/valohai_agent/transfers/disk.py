"""Back-pressure: what is written faster than the disk takes it is not left to pile up in memory."""

from __future__ import annotations

import ctypes
import functools
import os
from collections import deque
from collections.abc import Callable

DIRTY_BYTES = 128 * 1024 * 1024  # written but not yet on the disk, per file
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4


class WriteBack:
    """Starts writing each range to the disk as soon as it is complete, and waits for the oldest when many are not.

    Without it the kernel lets memory fill with dirty pages and then stalls everybody who writes, other jobs included.
    Where the system cannot do it (no Linux, or a file system that does not) nothing happens.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._started: deque[tuple[int, int]] = deque()
        self._dirty = 0

    def written(self, start: int, end: int) -> None:
        """A range is complete; may block. Not for several threads at once."""
        _sync_range(self._fd, start, end - start, _WRITE)
        self._started.append((start, end - start))
        self._dirty += end - start
        while self._dirty > DIRTY_BYTES:
            offset, count = self._started.popleft()
            self._dirty -= count
            _sync_range(self._fd, offset, count, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)


@functools.cache
def _call() -> Callable[..., int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def _sync_range(fd: int, offset: int, count: int, flags: int) -> None:
    """Raises what went wrong on the disk: errors of delayed writing come to light here."""
    call = _call()
    if call is None or call(fd, offset, count, flags) == 0:
        return
    number = ctypes.get_errno()
    if number in (5, 28, 122):  # EIO, ENOSPC, EDQUOT
        raise OSError(number, os.strerror(number))
