"""Whether a directory is as it was: everything that may change its archive or its commit changes the fingerprint."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.git import YAML, Work
from valohai_dagster.projects import fingerprint as module
from valohai_dagster.projects.fingerprint import fingerprint


@pytest.fixture
def work(tmp_path: Path) -> Work:
    work = Work(tmp_path / "repository")
    work.git("init", "-q", "-b", "main")
    work.write("project/valohai.yaml", YAML)
    work.write("project/train.py", "print(1)\n")
    work.commit()
    return work


def mark(work: Work) -> str:
    found = fingerprint(work.path / "project", without=work.path / "project" / ".valohai")
    assert found is not None
    return found.digest


def test_nothing_changed_is_seen_as_such(work: Work) -> None:
    before = mark(work)
    work.write("project/.valohai/records.db")
    work.write("project/env/pyvenv.cfg")
    work.write("project/env/lib/x.py")
    work.write("elsewhere.txt")
    assert mark(work) == before


CHANGES: dict[str, Callable[[Work], object]] = {
    "a file's text": lambda w: w.write("project/train.py", "print(2)\n"),
    "a new file": lambda w: w.write("project/more/extra.py"),
    "a removed file": lambda w: (w.path / "project/train.py").unlink(),
    "a renamed file": lambda w: (w.path / "project/train.py").rename(w.path / "project/t.py"),
    "a mode": lambda w: (w.path / "project/train.py").chmod(0o755),
    "a link": lambda w: (w.path / "project/link").symlink_to("train.py"),
    "a tracked dot file": lambda w: w.write("project/.config/a"),
    "an empty commit": lambda w: w.commit(),
    "a staged file": lambda w: (w.write("project/a"), w.git("add", "project/a")),
    "another branch": lambda w: w.git("switch", "-q", "-c", "other"),
    "an ignore file above": lambda w: w.write(".gitignore", "*.csv\n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(work: Work, change: str) -> None:
    before = mark(work)
    CHANGES[change](work)
    assert mark(work) != before


def test_a_change_of_the_same_size_and_time_is_seen(work: Work) -> None:
    path = work.path / "project/train.py"
    before, times = mark(work), path.stat()
    path.write_text("print(3)\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert mark(work) != before


def test_a_further_worktree_has_the_repositorys_branches(work: Work, tmp_path: Path) -> None:
    work.git("worktree", "add", "-q", "-b", "side", str(tmp_path / "side"))
    side = Work(tmp_path / "side")
    before = mark(side)
    assert mark(side) == before
    side.commit()
    assert mark(side) != before


def test_a_directory_without_git_has_one_too(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    assert fingerprint(tmp_path) == fingerprint(tmp_path)


def test_the_last_change_is_known(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    found = fingerprint(tmp_path)
    assert found is not None
    assert 0 <= time.time_ns() - found.newest_ns < 60e9


def test_a_large_directory_is_left_to_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 3)
    for number in range(4):
        (tmp_path / str(number)).write_text("x")
    assert fingerprint(tmp_path) is None


def test_a_directory_that_is_gone_has_none(tmp_path: Path) -> None:
    assert fingerprint(tmp_path / "gone") is None
