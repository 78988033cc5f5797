"""Unpacks the commit's archive without trusting it."""

from __future__ import annotations

from pathlib import Path


def unpack_archive(archive: Path, target: Path, *, sha256: str | None = None) -> None:
    """Unpacks a gzip tarball below `target`, after checking its sha256.

    Raises ArchiveError and leaves `target` incomplete when a member is absolute, has `..`, is a link that leads
    out of the tree, is a device or FIFO, or when the checksum or the compression is wrong.
    """
    raise NotImplementedError
