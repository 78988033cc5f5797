"""Trees of user code are opened and removed whatever they look like, and nothing outside of them is touched."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from valohai_agent import trees


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "d/deeper").mkdir(parents=True)
    (root / "d/deeper/x").write_text("x")
    (root / "link").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")
    for path in ("d/deeper/x", "d/deeper", "d"):
        (root / path).chmod(0)
    return root


def test_a_tree_without_permissions_is_opened(tree: Path) -> None:
    trees.open_tree(tree)
    assert (tree / "d/deeper/x").read_text() == "x"
    assert stat.S_IMODE((tree / "d/deeper/x").stat().st_mode) == 0o400
    assert stat.S_IMODE((tree / "d/deeper").stat().st_mode) == 0o700
    assert trees.first_unreadable(tree) is None


def test_a_tree_without_permissions_is_removed_and_links_are_not_followed(tree: Path) -> None:
    beside = tree.parent / "beside"
    beside.write_text("stays")
    trees.remove_tree(tree)
    assert not tree.exists()
    assert beside.read_text() == "stays"
    trees.remove_tree(tree)


@pytest.mark.parametrize("work", [trees.open_tree, trees.remove_tree, trees.first_unreadable])
def test_a_directory_that_becomes_a_link_meanwhile_is_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Path], object]
) -> None:
    host, root = tmp_path / "host", tmp_path / "tree"
    host.mkdir()
    (host / "secret").write_text("x")
    (host / "secret").chmod(0)
    (root / "d").mkdir(parents=True)
    is_directory = stat.S_ISDIR

    def exchange(mode: int) -> bool:
        """Asked when the status is known and the directory is not yet opened."""
        if is_directory(mode) and not (root / "d").is_symlink():
            (root / "d").rmdir()
            (root / "d").symlink_to(host)
        return is_directory(mode)

    with monkeypatch.context() as patch:
        patch.setattr(trees.stat, "S_ISDIR", exchange)
        with contextlib.suppress(NotADirectoryError):  # of what stays
            work(root)
    assert (root / "d").is_symlink()
    assert [path.name for path in host.iterdir()] == ["secret"]
    assert stat.S_IMODE((host / "secret").stat().st_mode) == 0


def test_the_first_thing_that_stays_is_told_after_the_rest_is_removed(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only another user's files stay; so the removal of one is refused here by hand."""
    (tree / "keep").write_text("x")
    unlink = os.unlink

    def refuse(path: str, *, dir_fd: int | None = None) -> None:
        if path == "keep":
            raise PermissionError(1, "not yours")
        unlink(path, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(trees.os, "unlink", refuse)
        with pytest.raises(PermissionError, match="not yours"):
            trees.remove_tree(tree)
    assert os.listdir(tree) == ["keep"]
