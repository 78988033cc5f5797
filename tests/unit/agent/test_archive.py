"""Commit archives are not trusted."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from valohai_agent.archive import unpack_archive
from valohai_agent.errors import ArchiveError


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    return info


def _archive(path: Path, *members: tarfile.TarInfo, data: bytes = b"x") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info in members:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


def _unpack(tmp_path: Path, *members: tarfile.TarInfo) -> Path:
    target = tmp_path / "repository"
    target.mkdir()
    unpack_archive(_archive(tmp_path / "a.tgz", *members), target)
    return target


def test_files_directories_links_and_modes_are_unpacked(tmp_path: Path) -> None:
    target = _unpack(
        tmp_path,
        _member("d", tarfile.DIRTYPE),
        _member("./d/run.sh", mode=0o755),
        _member("d/ä b\nc", mode=0o600),
        _member("link", tarfile.SYMTYPE, "d/run.sh"),
        _member("hard", tarfile.LNKTYPE, "d/run.sh"),
    )
    assert (target / "d/run.sh").stat().st_mode & 0o777 == 0o755
    assert (target / "d/ä b\nc").stat().st_mode & 0o777 == 0o644
    assert (target / "link").read_bytes() == (target / "hard").read_bytes() == b"x"


@pytest.mark.parametrize(
    "members",
    [
        [_member("/etc/evil")],
        [_member("../evil")],
        [_member("a/../../evil")],
        [_member("out", tarfile.SYMTYPE, "/etc"), _member("out/passwd")],
        [_member("out", tarfile.SYMTYPE, "/etc/passwd")],
        [_member("out", tarfile.SYMTYPE, "../../evil")],
        [_member("a", tarfile.DIRTYPE), _member("in", tarfile.SYMTYPE, "a"), _member("in/x")],
        [_member("hard", tarfile.LNKTYPE, "/etc/passwd")],
        [_member("hard", tarfile.LNKTYPE, "../evil")],
        [_member("s", tarfile.SYMTYPE, "x"), _member("hard", tarfile.LNKTYPE, "s")],
        [_member("pipe", tarfile.FIFOTYPE)],
        [_member("dev", tarfile.CHRTYPE)],
        [_member("dev", tarfile.BLKTYPE)],
    ],
)
def test_members_that_would_leave_the_repository_are_refused_by_name(
    tmp_path: Path, members: list[tarfile.TarInfo]
) -> None:
    with pytest.raises(ArchiveError, match="which is refused"):
        _unpack(tmp_path, *members)
    assert not (tmp_path / "evil").exists()


def test_a_file_replaces_a_link_instead_of_writing_through_it(tmp_path: Path) -> None:
    target = _unpack(tmp_path, _member("a"), _member("l", tarfile.SYMTYPE, "a"), _member("l"))
    assert not (target / "l").is_symlink()


def test_a_wrong_checksum_is_refused_with_both_sums(tmp_path: Path) -> None:
    archive = _archive(tmp_path / "a.tgz", _member("a"))
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(ArchiveError, match=actual):
        unpack_archive(archive, tmp_path, sha256="0" * 64)
    unpack_archive(archive, tmp_path, sha256=actual)


@pytest.mark.parametrize("content", [b"", b"no gzip at all", b"\x1f\x8b\x08\x00broken"])
def test_a_damaged_archive_is_said_to_be_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tgz").write_bytes(content)
    with pytest.raises(ArchiveError, match="archive"):
        unpack_archive(tmp_path / "a.tgz", tmp_path)


def test_a_cut_archive_is_said_to_be_damaged(tmp_path: Path) -> None:
    archive = _archive(tmp_path / "a.tgz", _member("a"), data=bytes(range(256)) * 500)
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(ArchiveError, match="damaged"):
        unpack_archive(archive, tmp_path)


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("valohai_agent.archive.MAX_MEMBERS", 2)
    with pytest.raises(ArchiveError, match="more than is allowed"):
        _unpack(tmp_path, _member("a"), _member("b"), _member("c"))
