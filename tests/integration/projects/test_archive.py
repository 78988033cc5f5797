"""The code archive: what is in it, that it is the same each time, and that it is stored once (S-30 to S-33)."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.git import YAML, Work
from valohai_dagster.errors import ProjectError
from valohai_dagster.executions.spec_model import CommitRef
from valohai_dagster.projects import packaging, source
from valohai_dagster.projects.archive import Archive, archive_key, build_archive, publish
from valohai_dagster.projects.project import load_project
from valohai_dagster.stores.local import LocalStore


def archive_of(path: Path | str, cache: Path) -> Archive:
    return build_archive(load_project(path, cache_dir=cache))


def names(archive: Archive) -> list[str]:
    with tarfile.open(archive.path) as tar:
        return tar.getnames()


@pytest.fixture
def plain(tmp_path: Path) -> Work:
    """A project without Git."""
    work = Work(tmp_path / "plain")
    work.write("valohai.yaml", YAML)
    work.write("train.py")
    return work


def test_a_commit_is_everything_git_tracks_dot_files_included(
    work: Work, remote: Path, cache: Path
) -> None:
    work.write(".gitignore", "*.log\n")
    work.write(".dvc/config")
    work.write("pkg/.hidden")
    work.write("x.log")
    work.commit()
    work.git("push", "-q", "origin", "main")
    expected = [".dvc/config", ".gitignore", "pkg/.hidden", "train.py", "valohai.yaml"]
    local, far = archive_of(work.path, cache), archive_of(f"file://{remote}", cache)
    assert names(local) == names(far) == expected
    assert local.sha256 == far.sha256
    assert local.files == 5


def test_s30_an_ad_hoc_package_is_what_git_would_add_without_top_level_dot_files(
    work: Work, cache: Path
) -> None:
    work.write(".gitignore", "*.log\nbuild/\n")
    work.write(".env", "SECRET=1")
    work.write("sub/.keep")
    work.write("a.log")
    work.write("build/x")
    work.write("data/big.bin")
    work.write("data/keep.txt")
    work.write("note.tmp")
    work.write(".vhignore", "data/*\n!data/keep.txt\n")
    work.write(".valohaiignore", "*.tmp\n")
    assert names(archive_of(work.path, cache)) == [
        "data/keep.txt",
        "sub/.keep",
        "train.py",
        "valohai.yaml",
    ]


def test_s30_without_git_the_walk_honours_gitignore_files_and_skips_hidden_names(
    plain: Work, cache: Path
) -> None:
    plain.write(".gitignore", "/out\n*.log\n")
    plain.write("out/x")
    plain.write("sub/out/y")
    plain.write("sub/.gitignore", "local.txt\n")
    plain.write("sub/local.txt")
    plain.write("local.txt")
    plain.write("sub/a.log")
    plain.write("sub/.hidden/z")
    plain.write(".venv/lib/x.py")
    assert names(archive_of(plain.path, cache)) == [
        "local.txt",
        "sub/out/y",
        "train.py",
        "valohai.yaml",
    ]


def test_s30_files_of_submodules_are_packed(work: Work, cache: Path, tmp_path: Path) -> None:
    library = Work(tmp_path / "library")
    library.git("init", "-q", "-b", "main")
    library.write("lib.py")
    library.commit()
    work.git("submodule", "add", "-q", str(library.path), "vendor")
    work.commit()
    assert "vendor/lib.py" in names(archive_of(work.path, cache))
    work.write("dirty.py")
    adhoc = archive_of(work.path, cache)
    assert adhoc.commit.adhoc
    assert {"vendor/lib.py", "dirty.py"} <= set(names(adhoc))


def test_a_deleted_file_is_left_out(work: Work, cache: Path) -> None:
    (work.path / "train.py").unlink()
    assert names(archive_of(work.path, cache)) == ["valohai.yaml"]


def test_s33_equal_trees_give_equal_bytes_whenever_and_by_whom(
    plain: Work, cache: Path, tmp_path: Path
) -> None:
    plain.write("b.sh").chmod(0o755)
    first = archive_of(plain.path, cache)
    os.utime(plain.path / "train.py", (10**9, 10**9))
    (plain.path / "train.py").chmod(0o600)
    again = archive_of(plain.path, tmp_path / "other-cache")
    assert first.sha256 == again.sha256 == hashlib.sha256(first.path.read_bytes()).hexdigest()
    assert first.path.read_bytes() == again.path.read_bytes()
    assert first.commit.identifier == f"~{first.sha256}"
    with gzip.open(first.path) as packed:
        packed.read()
        assert packed.mtime == 0
    with tarfile.open(first.path) as tar:
        modes = {
            entry.name: (entry.mode, entry.uid, entry.gid, entry.mtime, entry.uname)
            for entry in tar
        }
    assert modes["b.sh"] == (0o755, 0, 0, 0, "")
    assert modes["train.py"] == (0o644, 0, 0, 0, "")
    (plain.path / "b.sh").chmod(0o644)
    assert archive_of(plain.path, cache).sha256 != first.sha256


def test_odd_names_survive(plain: Work, cache: Path) -> None:
    odd = [
        "-dash",
        "a b",
        "line\nbreak",
        "ünï",
        "quo'te\"",
        "back\\slash",
        "x" * 200,
        "d/" * 60 + "deep",
    ]
    for name in odd:
        plain.write(name)
    (plain.path / os.fsdecode(b"latin-\xe9")).write_text("x")
    packed = names(archive_of(plain.path, cache))
    assert set(odd) <= set(packed)
    assert os.fsdecode(b"latin-\xe9") in packed
    plain.git("init", "-q", "-b", "main")
    plain.commit()
    assert set(packed) <= set(names(archive_of(plain.path, cache)))


def test_links_within_the_tree_stay_links_and_others_are_left_out_with_a_warning(
    plain: Work, cache: Path
) -> None:
    plain.write("sub/real.txt")
    for link, target in {
        "good": "sub/real.txt",
        "sub/up": "../train.py",
        "dir": "sub",
        "dangling": "nothing",
        "etc": "/etc/passwd",
        "out": "../outside",
        "sneaky": "sub/../../outside",
        "sub/deep": "../../x",
    }.items():
        (plain.path / link).symlink_to(target)
    archive = archive_of(plain.path, cache)
    with tarfile.open(archive.path) as tar:
        links = {entry.name: entry.linkname for entry in tar if entry.issym()}
    assert links == {
        "good": "sub/real.txt",
        "sub/up": "../train.py",
        "dir": "sub",
        "dangling": "nothing",
    }
    assert [w.split("'")[1] for w in archive.warnings] == ["etc", "out", "sneaky", "sub/deep"]


def test_special_files_are_left_out_with_a_warning(plain: Work, cache: Path) -> None:
    os.mkfifo(plain.path / "pipe")
    archive = archive_of(plain.path, cache)
    assert "pipe" not in names(archive)
    assert "'pipe' is not packed: it is no regular file" in archive.warnings


def test_a_repository_inside_that_is_no_submodule_is_left_out_with_a_warning(
    work: Work, cache: Path
) -> None:
    inner = Work(work.path / "inner")
    inner.git("init", "-q", "-b", "main")
    inner.write("x.py")
    inner.commit()
    archive = archive_of(work.path, cache)
    assert archive.commit.adhoc
    assert any("'inner/' is not packed" in warning for warning in archive.warnings)


def test_s32_limits_of_ad_hoc_packages(
    plain: Work, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        plain.write(f"f{number}", os.urandom(500).hex())
    monkeypatch.setattr(packaging, "LARGE_FILE", 1000)
    monkeypatch.setattr(packaging, "LARGE_TOTAL", 10_000)
    archive = archive_of(plain.path, cache)
    assert any("'f3' has" in warning and "inputs" in warning for warning in archive.warnings)
    assert any(".vhignore" in warning for warning in archive.warnings)
    monkeypatch.setattr(packaging, "MAX_FILES", 21)
    with pytest.raises(ProjectError, match=r"22 files.*\.vhignore"):
        archive_of(plain.path, cache)
    monkeypatch.setattr(packaging, "MAX_FILES", 22)
    monkeypatch.setattr(packaging, "MAX_RAW", 15_000)
    with pytest.raises(ProjectError, match=r"takes 0 MB.*\.vhignore"):
        archive_of(plain.path, cache)
    monkeypatch.setattr(packaging, "MAX_RAW", 10**9)
    monkeypatch.setattr(source, "MAX_PACKED", 5_000)
    with pytest.raises(ProjectError, match="packed project is larger"):
        archive_of(plain.path, cache / "fresh")
    assert not list((cache / "fresh" / "archives").iterdir())


def test_committed_trees_have_no_limits(
    work: Work, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaging, "MAX_FILES", 1)
    assert archive_of(work.path, cache).files == 2


def test_twelve_thousand_files_are_refused_ad_hoc_and_fine_when_committed(
    plain: Work, cache: Path
) -> None:
    for directory in range(120):
        (plain.path / f"d{directory}").mkdir()
        for number in range(100):
            (plain.path / f"d{directory}" / str(number)).touch()
    with pytest.raises(ProjectError, match="12,002 files"):
        archive_of(plain.path, cache)
    plain.git("init", "-q", "-b", "main")
    plain.commit()
    assert archive_of(plain.path, cache).files == 12_002


def test_an_unreadable_file_is_named(
    plain: Work, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from valohai_dagster.projects import tarball

    def vanish(tar: tarfile.TarFile, root: Path, name: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tarball, "_add", vanish)
    with pytest.raises(ProjectError, match=r"cannot pack 'train.py' .*: Permission denied"):
        archive_of(plain.path, cache)


def test_an_archive_is_packed_once_per_content(
    plain: Work, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in plain.path.iterdir():
        os.utime(path, (10**9, 10**9))
    first = archive_of(plain.path, cache)
    monkeypatch.setattr(source, "write_tarball", lambda *a, **k: pytest.fail("packed again"))
    assert archive_of(plain.path, cache).path == first.path


def test_many_threads_may_pack_the_same_directory_at_once(plain: Work, cache: Path) -> None:
    """A conductor does, on its lanes."""
    for path in plain.path.iterdir():
        os.utime(path, (10**9, 10**9))
    tree_of = functools.partial(source.checkout_files, plain.path)
    for round_number in range(20):
        directory = cache / str(round_number)
        barrier = threading.Barrier(6)

        def pack(_: int, directory: Path = directory, barrier: threading.Barrier = barrier) -> str:
            files = tree_of()
            barrier.wait(10)
            return source.pack(plain.path, files, directory).sha256

        with ThreadPoolExecutor(6) as pool:
            assert len(set(pool.map(pack, range(6)))) == 1


def test_old_archives_leave_the_cache(plain: Work, cache: Path) -> None:
    first = archive_of(plain.path, cache)
    os.utime(first.path, (1, 1))
    plain.write("more.py")
    archive_of(plain.path, cache)
    assert not first.path.exists()


def test_a_directory_that_changed_since_it_was_loaded_runs_under_its_true_identifier(
    work: Work, cache: Path
) -> None:
    clean = load_project(work.path, cache_dir=cache)
    work.write("train.py", "print(2)\n")
    archive = build_archive(clean)
    assert archive.commit.adhoc
    assert archive.commit.identifier == f"~{archive.sha256}"
    assert "the directory changed since the project was loaded" in archive.warnings[0]
    dirty = load_project(work.path, cache_dir=cache)
    assert build_archive(dirty).warnings == ()
    work.write("train.py", "print(3)\n")
    assert build_archive(dirty).commit != dirty.commit


def test_an_archive_is_stored_once_under_its_content(
    plain: Work, cache: Path, tmp_path: Path
) -> None:
    store = LocalStore("code", tmp_path / "store")
    archive = archive_of(plain.path, cache)
    published = publish(archive, store)
    assert published.archive_key == f"commits/plain/{archive.sha256}.tar.gz"
    with store.open(published.archive_key) as stored:
        assert stored.read() == archive.path.read_bytes()
    version = store.stat(published.archive_key)
    assert publish(archive, store) == published
    assert store.stat(published.archive_key) == version
    reference = CommitRef(**vars(published))
    assert (reference.identifier, reference.adhoc) == (f"~{archive.sha256}", True)


def test_a_lost_race_for_the_key_is_a_success(plain: Work, cache: Path, tmp_path: Path) -> None:
    class Blind(LocalStore):
        def stat(self, key: str) -> None:
            return None

    store = Blind("code", tmp_path / "store")
    archive = archive_of(plain.path, cache)
    assert publish(archive, store) == publish(archive, store)


def test_keys_are_safe_whatever_the_project_is_called() -> None:
    assert archive_key("../é /x", "0") == "commits/x/0.tar.gz"
    assert archive_key("..", "0") == "commits/project/0.tar.gz"
