"""Unpacks the commit's archive without trusting it."""

from __future__ import annotations

import hashlib
import os
import posixpath
import tarfile
import zlib
from pathlib import Path

from valohai_agent.errors import ArchiveError, DiskFull
from valohai_agent.local_files import is_disk_full

MAX_MEMBERS = 200_000
MAX_UNPACKED_BYTES = 64 * 1024**3
_CHUNK = 1024 * 1024


def unpack_archive(archive: Path, target: Path, *, sha256: str | None = None) -> None:
    """Unpacks a gzip tarball below `target`, after checking its sha256.

    Raises ArchiveError when a member is absolute, has `..`, lies behind a link, is a link that
    leads out of the tree, or is a device or FIFO; when the checksum or the compression is wrong;
    or when it unpacks to more than MAX_MEMBERS or MAX_UNPACKED_BYTES. `target` may then be
    incomplete. Owners are dropped; of the modes only the executable bit is kept.
    """
    if sha256 is not None:
        _verify(archive, sha256)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            _unpack(tar, target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ArchiveError(f"The code archive is damaged: {error}. Launch again.") from error
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull("The disk of the worker is full while unpacking the code.") from error
        raise ArchiveError(f"The code archive cannot be unpacked: {error}") from error


def _verify(archive: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != sha256.lower():
        raise ArchiveError(
            f"The code archive has sha256 {digest.hexdigest()}, expected {sha256}. "
            "It was damaged or replaced in the store; fetch the project's commit again."
        )


def _unpack(tar: tarfile.TarFile, target: Path) -> None:
    members = size = 0
    for member in tar:
        members, size = members + 1, size + member.size
        if members > MAX_MEMBERS or size > MAX_UNPACKED_BYTES:
            raise ArchiveError("The code archive unpacks to more than is allowed.")
        _extract(tar, member, target)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    parts = _safe_parts(member.name)
    if not parts:
        return
    parent = _real_directory(target, parts[:-1], member.name)
    path = parent / parts[-1]
    if member.isdir():
        if path.is_symlink():
            raise ArchiveError(_refusal(member.name, "it replaces a link by a directory"))
        path.mkdir(exist_ok=True)
    elif member.issym():
        _replace(path)
        os.symlink(_safe_link(member, parts), path)
    elif member.islnk():
        _replace(path)
        os.link(_link_source(target, member), path, follow_symlinks=False)
    elif member.isreg():
        _replace(path)
        _write(tar, member, path)
    else:
        raise ArchiveError(_refusal(member.name, "it is neither a file, a directory nor a link"))


def _safe_parts(name: str) -> list[str]:
    if name.startswith("/") or "\0" in name:
        raise ArchiveError(_refusal(name, "its path is absolute"))
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ArchiveError(_refusal(name, "its path leads out of the repository"))
    return parts


def _real_directory(target: Path, parts: list[str], name: str) -> Path:
    """The member's directory; made when missing, refused when a link is on the way to it."""
    path = target
    for part in parts:
        path = path / part
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ArchiveError(_refusal(name, f"{path.relative_to(target)} is no directory"))
        path.mkdir(exist_ok=True)
    return path


def _safe_link(member: tarfile.TarInfo, parts: list[str]) -> str:
    resolved = posixpath.normpath(posixpath.join("/".join(parts[:-1]), member.linkname))
    if member.linkname.startswith("/") or resolved == ".." or resolved.startswith("../"):
        raise ArchiveError(_refusal(member.name, f"it links to {member.linkname!r}"))
    return member.linkname


def _link_source(target: Path, member: tarfile.TarInfo) -> Path:
    parts = _safe_parts(member.linkname)
    if not parts:
        raise ArchiveError(_refusal(member.name, "it links to nothing"))
    source = _real_directory(target, parts[:-1], member.name) / parts[-1]
    if source.is_symlink() or not source.is_file():
        raise ArchiveError(_refusal(member.name, f"it links to {member.linkname!r}"))
    return source


def _replace(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(member)
    assert source is not None  # isreg
    mode = 0o755 if member.mode & 0o100 else 0o644
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(fd, "wb") as file:
        while chunk := source.read(_CHUNK):
            file.write(chunk)
    os.utime(path, (member.mtime, member.mtime))


def _refusal(name: str, why: str) -> str:
    return f"The code archive holds the member {name!r}, which is refused: {why}."
