"""Unpacks a package of dataset files, an uncompressed tar, without trusting it (I-09)."""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from valohai_agent.cache.local import agree
from valohai_agent.checksums import Hasher
from valohai_agent.errors import ArchiveError
from valohai_agent.protocol import Checksums

BLOCK = 512  # of a tar: headers are one, contents fill up the last one
_CHUNK = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """What a member has to be, and where it is wanted; the places do not exist, their directories do."""

    label: str
    size: int | None
    checksums: Checksums
    places: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unpacked:
    """A member that is whole in all its places."""

    name: str
    size: int
    checksums: Checksums


def footprint(size: int) -> int:
    """Bytes that a file of that size takes in a package."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def unpack_package(package: Path, members: Mapping[str, Member]) -> Iterator[Unpacked]:
    """Writes the members that are wanted, by name, and tells each once it is written and verified.

    A name only selects a member, it never becomes a path. Raises ArchiveError for a damaged tar, a member that is no
    plain file, one that comes twice, and a content with another size or checksum than is expected; what was told by
    then is whole, and nothing is left of the member that is wrong. Raises OSError of the disk.
    """
    seen: set[str] = set()
    try:
        with tarfile.open(package, "r:") as tar:
            for entry in tar:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] - else it keeps all of them
                if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise ArchiveError(f"its member {entry.name!r} is no plain file")
                member = members.get(entry.name)
                if member is None:
                    continue
                if entry.name in seen:
                    raise ArchiveError(f"its member {entry.name!r} comes twice")
                seen.add(entry.name)
                yield _unpack(tar, entry, member)
    except tarfile.TarError as error:
        raise ArchiveError(f"it is damaged: {error}") from error


def _unpack(tar: tarfile.TarFile, entry: tarfile.TarInfo, member: Member) -> Unpacked:
    if member.size not in (None, entry.size):
        raise ArchiveError(f"{member.label} has {entry.size} bytes in it, expected {member.size}")
    source = tar.extractfile(entry)
    assert source is not None  # a plain file
    try:
        hasher = _write(source, member.places)
        if hasher.size != entry.size or not agree(hasher.checksums(), member.checksums):
            raise ArchiveError(f"{member.label} has another content in it than its record says")
    except BaseException:
        for place in member.places:
            place.unlink(missing_ok=True)
        raise
    return Unpacked(name=entry.name, size=hasher.size, checksums=hasher.checksums())


def _write(source: IO[bytes], places: tuple[Path, ...]) -> Hasher:
    hasher = Hasher()
    with contextlib.ExitStack() as stack:
        targets = [stack.enter_context(_new_file(place)) for place in places]
        while chunk := source.read(_CHUNK):
            hasher.update(chunk)
            for target in targets:
                target.write(chunk)
    return hasher


def _new_file(path: Path) -> IO[bytes]:
    """Everybody may read it, whatever the agent's umask: commands may run as anybody."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    os.fchmod(fd, 0o644)
    return os.fdopen(fd, "wb")
