"""Moves one file by one signed request: http(s):// or file://, streaming, hashed on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valohai_agent.protocol import Checksums, Transfer


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """What went over the wire."""

    size: int
    checksums: Checksums
    etag: str | None = None


Progress = Callable[[int, "int | None"], None]
"""Called with bytes done and bytes expected, at most a few times a second."""


class Transferer:
    """Downloads and uploads with one connection pool; safe to use from several threads.

    Temporary troubles (no connection, time-outs, 408, 429, 5xx) are retried up to `attempts` times with jittered
    back-off (`Retry-After` is honoured); everything else fails at once with the subclass of TransferError that says
    what it was. `cancelled` ends waiting and streaming early with Unreachable.
    """

    def __init__(
        self,
        *,
        attempts: int = 5,
        timeout: tuple[float, float] = (10.0, 60.0),
        sleep: Callable[[float], Any] | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        raise NotImplementedError

    def download(
        self,
        transfer: Transfer,
        target: Path,
        *,
        name: str,
        expected: Checksums | None = None,
        size: int | None = None,
        progress: Progress | None = None,
    ) -> Transferred:
        """Writes `target` atomically (temporary file beside it, then rename). `name` is what errors call it."""
        raise NotImplementedError

    def upload(
        self, source: Path, transfer: Transfer, *, name: str, progress: Progress | None = None
    ) -> Transferred:
        """Sends `source` with PUT; to `file://` it writes beside, syncs and links, never overwriting."""
        raise NotImplementedError
