"""The cache of one machine: several threads and processes, crashes, damage, limits (I-33, I-35)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.ports import wait_for
from valohai_agent.cache import local, locks
from valohai_agent.cache.index import Content, Index
from valohai_agent.cache.keeping import Caretaker
from valohai_agent.cache.local import InputCache, Wanted, place
from valohai_agent.protocol import Checksums, content_mark

GB = 10**9


def sums(data: bytes) -> Checksums:
    return Checksums(
        md5=hashlib.md5(data).hexdigest(),
        sha1=hashlib.sha1(data).hexdigest(),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def named(*names: str, **fields: Checksums) -> Wanted:
    return Wanted(names=names, **fields)


def add(cache: InputCache, data: bytes, *names: str, seconds: float = 1.0) -> Path:
    with cache.arrivals() as directory:
        arrived = directory / "0"
        arrived.write_bytes(data)
        return cache.add(named(*names), arrived, len(data), sums(data), seconds=seconds).path


def tree(directory: Path) -> list[str]:
    """All files below, but for those of the index and of locks."""
    return sorted(
        path.name
        for path in directory.rglob("*")
        if path.is_file() and path.parent.name != "locks" and not path.name.startswith("index.db")
    )


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[InputCache]:
    cache = InputCache(tmp_path / "cache", usage=lambda path: (0, 10**15))
    yield cache
    cache.close()


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Callable[[int], InputCache]]:
    """A cache of so many bytes."""
    with contextlib.ExitStack() as stack:

        def make(max_bytes: int) -> InputCache:
            cache = InputCache(
                tmp_path / "limited", max_bytes=max_bytes, usage=lambda path: (0, 10**15)
            )
            stack.callback(cache.close)
            return cache

        yield make


# -- contents and names ---------------------------------------------------------------------------------------------


def test_i33_the_same_bytes_under_two_names_are_stored_once(cache: InputCache) -> None:
    first, second = add(cache, b"data", "s3://b/k@1"), add(cache, b"data", "gs://c/x@7")
    assert first == second
    for name in ("s3://b/k@1", "gs://c/x@7", f"sha256:{sums(b'data').sha256}"):
        found = cache.find(named(name))
        assert found is not None
        assert (found.path, found.size, found.checksums) == (first, 4, sums(b"data"))


def test_i35_another_version_is_another_content(cache: InputCache) -> None:
    add(cache, b"one", "http://x/a#1")
    assert cache.find(named("http://x/a#2")) is None
    add(cache, b"two", "http://x/a#2")
    assert [cache.find(named(f"http://x/a#{n}")).checksums for n in (1, 2)] == [  # type: ignore[union-attr]
        sums(b"one"),
        sums(b"two"),
    ]


def test_a_name_that_leads_to_other_content_than_expected_is_forgotten(cache: InputCache) -> None:
    add(cache, b"old", "k", "other")
    assert cache.find(named("k", checksums=sums(b"new"))) is None
    assert cache.find(named("k")) is None
    assert cache.find(named("other")) is not None


def test_many_are_looked_up_at_once(cache: InputCache) -> None:
    for number in range(20):
        add(cache, b"%d" % number, f"k{number}")
    found = cache.find_all([named(f"k{number}") for number in range(-5, 25)])
    assert [one is not None for one in found] == [False] * 5 + [True] * 20 + [False] * 5


def test_the_queue_is_told_the_largest_contents_by_all_their_names(
    cache: InputCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "MARKS", 2)
    for size in (10, 30, 20):
        add(cache, b"x" * size, f"k{size}")
    names = ["k30", "k20", *(f"sha256:{sums(b'x' * size).sha256}" for size in (30, 20))]
    assert sorted(cache.marks()) == sorted(content_mark(name) for name in names)


def test_what_was_not_written_is_told_to_everybody_who_added_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several threads that add at once one writes for all."""
    index, failed = Index(tmp_path / "index.db"), list[str]()

    def add(number: int) -> None:
        content = Content(checksums=Checksums(sha256=f"{number:064d}"), size=1, mtime_ns=1, inode=1)
        try:
            index.put(content, [f"k{number}"])
        except sqlite3.OperationalError as error:
            failed.append(str(error))

    def full(self: Index) -> None:
        raise sqlite3.OperationalError("disk full")

    monkeypatch.setattr(Index, "_writing", full)
    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    with index._lock:
        for thread in threads:
            thread.start()
        wait_for(lambda: len(index._pending) == 4, what="the others")
    for thread in threads:
        thread.join()
    assert failed == ["disk full"] * 4
    monkeypatch.undo()
    add(5)
    assert list(index.find(["k1", "k5"])) == ["k5"]
    index.close()


# -- damage ---------------------------------------------------------------------------------------------------------


def test_i35_a_damaged_content_is_not_found_and_goes(cache: InputCache) -> None:
    path = add(cache, b"data", "k")
    path.write_bytes(b"dama")
    assert cache.find_all([named("k")]) == [None]
    assert cache.find(named("k")) is None
    assert not path.exists()


def test_a_file_that_was_touched_but_is_right_is_found(cache: InputCache) -> None:
    path = add(cache, b"data", "k")
    os.utime(path, (1, 1))
    assert cache.find_all([named("k")]) == [None]  # a second look is due
    assert cache.find(named("k")) is not None
    assert cache.find_all([named("k")]) != [None]


def test_links_of_jobs_need_no_second_look(cache: InputCache, tmp_path: Path) -> None:
    add(cache, b"data", "k")
    found = cache.find(named("k"))
    assert found is not None
    place(found, tmp_path / "in-a-job", link=True)
    (tmp_path / "in-a-job").unlink()
    assert cache.find_all([named("k")]) != [None]


def test_an_idle_agent_reads_old_contents_again_and_finds_silent_damage(cache: InputCache) -> None:
    path = add(cache, b"data", "k")
    status = path.stat()
    path.write_bytes(b"dama")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a bad disk would do it
    assert cache.find(named("k")) is not None
    caretaker = Caretaker(cache, idle=lambda: True, verify_after=-60, round_seconds=0.01)
    caretaker.start()
    wait_for(lambda: not path.exists(), what="the end of the damaged content")
    caretaker.close()
    assert cache.find(named("k")) is None


def test_verification_stops_when_there_is_work(cache: InputCache) -> None:
    add(cache, b"x" * (3 * local.CHUNK_BYTES), "k")
    pieces: list[int] = []

    def pace(size: int) -> bool:
        pieces.append(size)
        return len(pieces) < 2

    assert cache.verify_oldest(time.time() + 60, pace=pace) is False
    assert len(pieces) == 2


def test_a_missing_content_is_not_found(cache: InputCache) -> None:
    add(cache, b"data", "k").unlink()
    assert cache.find(named("k")) is None


def test_a_damaged_index_begins_anew_and_its_contents_are_swept_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = InputCache(tmp_path, usage=lambda path: (0, 10**15))
    path = add(first, b"data", "k")
    first.close()
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"index.db{suffix}").unlink(missing_ok=True)
    (tmp_path / "index.db").write_bytes(b"no database at all" * 1000)
    monkeypatch.setattr(local, "ORPHAN_SECONDS", -1.0)
    second = InputCache(tmp_path, usage=lambda path: (0, 10**15))
    assert second.find(named("k")) is None
    second.sweep()
    assert not path.exists()
    add(second, b"data", "k")
    assert second.find(named("k")) is not None
    second.close()


def test_trouble_of_the_cache_is_no_trouble_of_the_job(
    cache: InputCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Index, names: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(Index, "find", broken)
    assert cache.find(named("k")) is None
    assert cache.find_all([named("k")]) == [None]
    assert "disk I/O error" in caplog.text


# -- room -----------------------------------------------------------------------------------------------------------


def test_i35_what_is_cheap_to_fetch_again_goes_first(
    limited: Callable[[int], InputCache],
) -> None:
    cache = limited(30_000)
    add(cache, b"a" * 10_000, "dear", seconds=100)
    add(cache, b"b" * 10_000, "cheap", seconds=0.1)
    add(cache, b"c" * 10_000, "medium", seconds=3)
    assert cache.make_room(10_000) == 10_000
    assert [cache.find(named(name)) is not None for name in ("dear", "cheap", "medium")] == [
        True,
        False,
        True,
    ]


def test_i35_of_equals_the_least_recently_used_goes(tmp_path: Path) -> None:
    times = iter(range(100))
    cache = InputCache(
        tmp_path, max_bytes=30_000, usage=lambda path: (0, 10**15), now=lambda: float(next(times))
    )
    for name in ("a", "b", "c"):
        add(cache, name.encode() * 10_000, name)
    assert cache.find(named("a")) is not None
    assert cache.make_room(1) == 10_000
    assert [cache.find(named(name)) is not None for name in "abc"] == [True, False, True]
    cache.close()


def test_i35_the_disk_mark_holds_for_what_others_use_too(tmp_path: Path) -> None:
    used = [79_000]
    cache = InputCache(tmp_path, usage=lambda path: (used[0], 100_000))
    add(cache, b"x" * 5_000, "k")
    assert cache.make_room() == 0
    assert cache.make_room(2_000) == 5_000
    assert cache.find(named("k")) is None
    cache.close()


def test_i35_files_of_running_jobs_and_copies_in_progress_never_go(
    limited: Callable[[int], InputCache], tmp_path: Path
) -> None:
    cache = limited(10)
    add(cache, b"a" * 10_000, "linked")
    add(cache, b"b" * 300_000, "copied")  # more than fits into a pipe
    add(cache, b"c" * 10_000, "idle")
    linked, copied = cache.find(named("linked")), cache.find(named("copied"))
    assert linked is not None
    assert copied is not None
    place(linked, tmp_path / "in-a-job", link=True)
    os.mkfifo(tmp_path / "gate")
    copying = threading.Thread(target=_copy_slowly, args=(copied.path, tmp_path / "gate"))
    copying.start()
    with (tmp_path / "gate").open("rb") as gate:
        gate.read(1)  # it has begun
        assert cache.make_room() == 10_000
        assert [cache.find(named(n)) is not None for n in ("linked", "copied", "idle")] == [
            True,
            True,
            False,
        ]
        assert cache.clear() == 0
        gate.read()
    copying.join()
    (tmp_path / "in-a-job").unlink()
    assert cache.clear() == 310_000


def _copy_slowly(source: Path, gate: Path) -> None:
    """As `place` copies, to somewhere that takes its time."""
    import fcntl

    with source.open("rb") as file, gate.open("wb", buffering=0) as target:
        fcntl.flock(file, fcntl.LOCK_SH)
        while chunk := file.read(64):
            target.write(chunk)


def test_k22_clearing_leaves_what_running_jobs_use(cache: InputCache, tmp_path: Path) -> None:
    add(cache, b"idle", "idle")
    os.link(add(cache, b"used", "used"), tmp_path / "in-a-job")
    add(cache, b"", "empty")
    assert cache.clear() == 4
    assert [cache.find(named(n)) is not None for n in ("idle", "used", "empty")] == [
        False,
        True,
        False,
    ]


def test_a_file_beyond_the_limit_is_not_kept(limited: Callable[[int], InputCache]) -> None:
    cache = limited(100)
    assert not cache.takes(101)
    assert cache.takes(100)
    assert cache.takes(None)


# -- several processes ----------------------------------------------------------------------------------------------

FETCHER = """
import sys, time
from pathlib import Path
from valohai_agent.cache.local import InputCache, Wanted, place
from valohai_agent.protocol import Checksums
import hashlib

directory, target, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
cache = InputCache(directory)
wanted = Wanted(names=("k",))
data = b"data" * 1000
with cache.arrivals() as arrivals, cache.fetching("k"):
    found = cache.find(wanted)
    if found is None:
        arrived = arrivals / "0"
        with arrived.open("wb") as file:
            file.write(data[:2000])
            file.flush()
            print("downloading", flush=True)
            time.sleep(pause)
            file.write(data[2000:])
        sums = Checksums(**{k: hashlib.new(k, data).hexdigest() for k in ("md5", "sha1", "sha256")})
        found = cache.add(wanted, arrived, len(data), sums, seconds=pause)
    else:
        print("found", flush=True)
    place(found, target, link=True)
cache.close()
"""


def fetcher(directory: Path, target: Path, pause: float) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", FETCHER, str(directory), str(target), str(pause)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def test_i33_processes_that_want_the_same_download_it_once(tmp_path: Path) -> None:
    started = [fetcher(tmp_path / "cache", tmp_path / f"job-{n}", 0.3) for n in range(5)]
    said = [process.communicate(timeout=60)[0].strip() for process in started]
    assert sorted(said) == ["downloading", *["found"] * 4]
    assert {(tmp_path / f"job-{n}").read_bytes() for n in range(5)} == {b"data" * 1000}
    assert len({(tmp_path / f"job-{n}").stat().st_ino for n in range(5)}) == 1


def test_i33_another_goes_on_when_the_downloader_is_killed(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    first = fetcher(directory, tmp_path / "job-1", 600)
    with first:
        assert first.stdout is not None
        assert first.stdout.readline() == "downloading\n"
        second = fetcher(directory, tmp_path / "job-2", 0)
        os.kill(first.pid, signal.SIGKILL)
    assert second.communicate(timeout=60)[0] == "downloading\n"
    assert (tmp_path / "job-2").read_bytes() == b"data" * 1000
    assert len(tree(directory)) == 3  # the half file and its directory's lock are still there
    cache = InputCache(directory)
    cache.sweep()
    cache.close()
    assert tree(directory) == [sums(b"data" * 1000).sha256]


def test_sweeping_leaves_what_is_on_its_way(cache: InputCache) -> None:
    with cache.arrivals() as directory:
        (directory / "half").write_bytes(b"x")
        cache.sweep()
        assert (directory / "half").exists()
    assert not directory.exists()


def test_a_long_wait_for_another_download_is_told_and_can_be_ended(
    cache: InputCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SLOW_SECONDS", 0.0)
    told = threading.Event()
    ended = threading.Event()

    class Ended(Exception):
        pass

    def check() -> None:
        if ended.is_set():
            raise Ended

    def wait() -> None:
        waiting = locks.Waiting(tell=lambda seconds: told.set(), check=check)
        with pytest.raises(Ended), cache.fetching("k", waiting):
            pass

    with cache.fetching("k"), cache.fetching("another"):
        thread = threading.Thread(target=wait)
        thread.start()
        assert told.wait(10)
        ended.set()
        thread.join()


def test_lock_files_do_the_same_where_bytes_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "RANGES", False)
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(50):
            with locks.held_name(tmp_path / "names", "ab" * 32):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert os.listdir(tmp_path) == []


# -- many -----------------------------------------------------------------------------------------------------------


def test_an_index_of_many_contents_answers_without_looking_at_all_of_them(tmp_path: Path) -> None:
    """What a heartbeat and the lookup of an input ask uses the indexes of the database, whatever there is in it."""
    index = Index(tmp_path / "index.db")
    for number in range(50):
        content = Content(
            checksums=Checksums(sha256=f"{number:064d}"), size=number, mtime_ns=1, inode=1
        )
        index.put(content, [f"k{number}"])
    assert index.find(["k7"])["k7"].size == 7
    plans = {
        "SELECT sha256 FROM names WHERE digest IN ('a')": "SEARCH names",
        "SELECT sha256 FROM content ORDER BY size DESC LIMIT 9": "USING COVERING INDEX content_by_size",
        "SELECT SUM(size) FROM content": "USING COVERING INDEX",
        "SELECT sha256, size, worth, used_at FROM content WHERE (worth, used_at, sha256) > (0, 0, '') "
        "ORDER BY worth, used_at, sha256 LIMIT 9": "USING COVERING INDEX content_by_worth",
    }
    with contextlib.closing(sqlite3.connect(tmp_path / "index.db")) as db:
        for query, expected in plans.items():
            plan = " ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}"))
            assert expected in plan
            assert "TEMP B-TREE" not in plan
    index.close()
