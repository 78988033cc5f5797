"""The three checksums of every file (I-32, O-19), and sizes as the log shows them (I-31)."""

from __future__ import annotations

import hashlib

from valohai_agent.protocol import Checksums


class Hasher:
    """md5, sha1 and sha256 in one pass, with the number of bytes."""

    def __init__(self) -> None:
        self.size = 0
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._sha1 = hashlib.sha1(usedforsecurity=False)
        self._sha256 = hashlib.sha256()

    def update(self, data: bytes) -> None:
        self.size += len(data)
        self._md5.update(data)
        self._sha1.update(data)
        self._sha256.update(data)

    def checksums(self) -> Checksums:
        return Checksums(
            md5=self._md5.hexdigest(),
            sha1=self._sha1.hexdigest(),
            sha256=self._sha256.hexdigest(),
        )


def decimal_size(size: int) -> str:
    """`28.9 kB`: decimal units, one digit (I-31)."""
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} PB"
