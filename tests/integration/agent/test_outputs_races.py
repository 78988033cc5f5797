"""A command that changes its outputs between two steps of the agent reaches no file outside of them (O-16)."""

from __future__ import annotations

import ctypes
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.output_rig import Rig
from valohai_agent import output_tree
from valohai_agent.beneath import NotRegular, Place
from valohai_agent.protocol import GrantRequest, Grants

_LIBC = ctypes.CDLL(None, use_errno=True)
_HERE, _EXCHANGE = -100, 2


def exchange(one: Path, other: Path) -> None:
    """Each takes the other's name, in one step (renameat2)."""
    if _LIBC.renameat2(_HERE, bytes(one), _HERE, bytes(other), _EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2")


class Trap:
    """Outputs with a directory `d` that a command can exchange for a link to a directory of the host."""

    def __init__(self, rig: Rig, host: Path) -> None:
        self.rig, self.host = rig, host
        host.mkdir()
        for name, mode in (("x", 0o440), ("x.metadata.json", 0o644)):
            (host / name).write_text('{"host": "secret"}')
            (host / name).chmod(mode)
            os.utime(host / name, (1, 1))
        (rig.outputs / "e").symlink_to(host)
        self._sprung = False

    def spring(self) -> None:
        if not self._sprung:
            self._sprung = True
            exchange(self.rig.outputs / "d", self.rig.outputs / "e")

    def assert_host_is_untouched(self) -> None:
        assert self._sprung
        assert sorted(path.name for path in self.host.iterdir()) == ["x", "x.metadata.json"]
        assert (self.host / "x").read_text() == '{"host": "secret"}'
        for report in self.rig.reports:
            assert b"secret" not in self.rig.stored(report)
            assert "host" not in report.metadata


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.fixture
def trap(rig: Rig, tmp_path: Path) -> Trap:
    return Trap(rig, tmp_path / "host")


def _when_a_directory_is_seen(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Calls `act` when the walk has the status of a directory but has not opened it yet."""
    is_directory = stat.S_ISDIR

    def seen(mode: int) -> bool:
        if is_directory(mode):
            act()
        return is_directory(mode)

    monkeypatch.setattr(output_tree.stat, "S_ISDIR", seen)


def test_a_directory_exchanged_for_a_link_before_it_is_listed_is_not_entered(
    rig: Rig, trap: Trap, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.write("d/own", mode=0o444)
    with monkeypatch.context() as patch:
        _when_a_directory_is_seen(patch, trap.spring)
        rig.collector.scan_now()
    trap.assert_host_is_untouched()
    assert rig.finish().problems == []
    trap.assert_host_is_untouched()
    assert rig.names() == ["e/own"]


def test_a_directory_exchanged_before_a_live_file_is_taken_leaves_the_host_its_file(
    rig: Rig, trap: Trap
) -> None:
    rig.write("d/x", mode=0o444)
    rig.write("d/x.metadata.json", "{}")

    def now() -> float:  # asked last before the file is taken
        trap.spring()
        return rig.seconds

    rig.collector._now = now
    assert rig.collector.scan_now() == 0
    trap.assert_host_is_untouched()
    rig.finish()
    trap.assert_host_is_untouched()
    assert rig.names() == ["e/x"]


def _link(path: Path, host: Path) -> None:
    path.symlink_to(host / "x")


def _other_file(path: Path, host: Path) -> None:
    path.write_text("still being written")


def _directory(path: Path, host: Path) -> None:
    path.mkdir()
    (path / "y").write_text("y")


def _fifo(path: Path, host: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [_link, _other_file, _directory, _fifo])
def test_what_takes_a_live_files_place_is_put_back_and_not_uploaded(
    rig: Rig, trap: Trap, make: Callable[[Path, Path], None]
) -> None:
    path = rig.write("x", mode=0o444)
    replaced: list[int] = []

    def now() -> float:
        if not replaced:
            path.unlink()
            make(path, trap.host)
            replaced.append(path.lstat().st_ino)
        return rig.seconds

    rig.collector._now = now
    assert rig.collector.scan_now() == 0
    assert [path.lstat().st_ino] == replaced
    assert rig.reports == []
    assert list((rig.workspace.run / "spool").iterdir()) == []


def test_another_users_file_is_put_back_though_it_may_not_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses the link (protected_hardlinks), but not to the root user that tests may be."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    place, target = (Place(root=tmp_path, relative=name) for name in ("x", "taken"))
    (tmp_path / "x").write_text("as it was seen")
    seen = place.status()
    (tmp_path / "x").write_text("as it is now")
    monkeypatch.setattr(os, "link", refuse)
    assert not place.move(target, seen)
    assert (tmp_path / "x").read_text() == "as it is now"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("output", ["d/x", "link"])
def test_a_directory_exchanged_before_the_upload_is_a_problem(
    rig: Rig, trap: Trap, output: str
) -> None:
    rig.write("d/x", "own")
    rig.write("d/x.metadata.json", "{}")
    if output == "link":
        (rig.outputs / "link").symlink_to("d/x")
    grant = rig.grant

    def grant_late(requests: list[GrantRequest]) -> Grants:
        trap.spring()
        return grant(requests)

    rig.grant = grant_late
    rig.collector = rig.new_collector()
    problems = rig.finish().problems
    trap.assert_host_is_untouched()
    assert any(f"Output {output!r} could not be stored" in problem for problem in problems)
    assert output not in rig.names()


def test_metadata_beside_an_output_is_not_read_through_links(rig: Rig, trap: Trap) -> None:
    rig.write("d/x")
    (rig.outputs / "valohai.metadata.jsonl").symlink_to(trap.host / "x")
    (rig.outputs / "d/x.metadata.json").symlink_to(trap.host / "x.metadata.json")
    trap.spring()
    rig.finish()
    trap.assert_host_is_untouched()
    assert rig.names() == ["e/x"]
    assert rig.metadata("e/x") == {}


def test_a_command_that_exchanges_directories_all_the_time_gets_nothing_of_the_host(
    rig: Rig, trap: Trap
) -> None:
    rig.write("d/own", "own")
    over = threading.Event()

    def command() -> None:
        while not over.is_set():
            exchange(rig.outputs / "d", rig.outputs / "e")

    trap.spring()
    thread = threading.Thread(target=command)
    thread.start()
    try:
        for _ in range(2_000):
            rig.collector.scan_now()
    finally:
        over.set()
        thread.join()
    trap.assert_host_is_untouched()
    assert rig.reports == []


# -- one place ------------------------------------------------------------------------------------------------


def test_a_place_is_opened_below_its_root_only(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x").write_text("x")
    (tmp_path / "way").symlink_to("d")
    (tmp_path / "d/link").symlink_to("x")
    os.mkfifo(tmp_path / "pipe")

    def place(relative: str) -> Place:
        return Place(root=tmp_path, relative=relative)

    with place("d//./x").open() as file:
        assert file.read() == b"x"
    for relative in ("d/link", "pipe", "d", "way"):
        with pytest.raises(NotRegular):
            place(relative).open()
    for relative in ("way/x", "d/../d/x", "d/x/y", "a/" * 3_000 + "x"):
        with pytest.raises(OSError, match=r"Not a directory|upwards|too long"):
            place(relative).open()
    assert place("d/link").target() == "x"
    place("d/link").remove()
    place("d/link").remove()
    assert sorted(os.listdir(tmp_path / "d")) == ["x"]


def test_no_file_descriptor_stays_open(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    place = Place(root=tmp_path, relative="a/b/x")
    with pytest.raises(FileNotFoundError):
        place.open()
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x").symlink_to("y")
    with pytest.raises(NotRegular):
        place.open()
    assert place.target() == "y"
    assert len(Place(root=tmp_path, relative="a/b").list()) == 1
    assert sorted(os.listdir("/proc/self/fd")) == before
