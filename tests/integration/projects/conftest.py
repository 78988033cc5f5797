"""A project under Git, a bare remote of it, and the same remote behind HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.git import YAML, GitServer, Work, serving


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """A project with one commit on `main`."""
    work = Work(tmp_path / "my project")
    work.git("init", "-q", "-b", "main")
    work.write("valohai.yaml", YAML)
    work.write("train.py", "print(1)\n")
    work.commit("first")
    return work


@pytest.fixture
def remote(work: Work, tmp_path: Path) -> Path:
    """A bare remote with the same commit; `work` pushes to it as `origin`."""
    path = tmp_path / "remotes" / "project.git"
    path.parent.mkdir()
    work.git("clone", "-q", "--bare", ".", str(path))
    work.git("remote", "add", "origin", str(path))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def git_server(remote: Path) -> Iterator[GitServer]:
    with serving(GitServer(remote.parent, "git", "s3cret-token")) as server:
        yield server
