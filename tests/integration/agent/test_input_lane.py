"""Small inputs by the lane: fetched once, whoever else wants them, with grants asked for as they are needed."""

from __future__ import annotations

import hashlib
import os
import resource
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import web as answers
from tests.support.web import Web, serve
from valohai_agent import input_lane
from valohai_agent.cache.local import InputCache
from valohai_agent.cache.locks import RANGES, HeldNames
from valohai_agent.errors import InputError
from valohai_agent.grants import NoGrants
from valohai_agent.inputs import InputFetcher, InputOptions
from valohai_agent.protocol import Checksums, JobFile, JobInput, Transfer, name_digest
from valohai_agent.transfer import Transferer
from valohai_agent.workspace import Workspace


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[InputCache]:
    cache = InputCache(tmp_path / "cache", usage=lambda path: (1, 10**15))
    yield cache
    cache.close()


class Job:
    def __init__(self, tmp_path: Path, cache: InputCache | None, name: str = "e") -> None:
        self.workspace = Workspace.create(tmp_path / "work", name, 1, "w")
        self.said: list[str] = []
        self.cache = cache

    def fetch(
        self, files: list[JobFile], grants: Mapping[str, Transfer], renew: Any = None
    ) -> dict[str, bytes]:
        fetcher = InputFetcher(
            self.workspace,
            valohai_dir="/valohai",
            transferer=Transferer(attempts=3, sleep=lambda seconds: None),
            options=InputOptions(cache=self.cache),
            status=self.said.append,
            on_ready=lambda report: None,
            renew=renew,
        )
        fetcher.fetch([JobInput(name="d", input_id="d", files=files)], grants)
        directory = self.workspace.inputs / "d"
        return {path.name: path.read_bytes() for path in directory.iterdir()}


def files_on(web: Web, count: int, *, contents: int | None = None) -> list[JobFile]:
    """`contents`: how many different ones there are; as many as files by default."""
    files = []
    for number in range(count):
        content = f"content {number % (contents or count)}".encode()
        web.answers[f"/{number}"] = [answers.content(content)]
        digest = hashlib.sha256(content).hexdigest()
        files.append(
            JobFile(
                id=str(number),
                name=f"f{number}",
                uri=f"datum://{number}",
                datum_id=str(number),
                size=len(content),
                checksums=Checksums(sha256=digest),
            )
        )
    return files


def grants(web: Web, files: list[JobFile]) -> dict[str, Transfer]:
    return {file.id: Transfer(url=web.url(f"/{file.id}")) for file in files}


def test_i30_many_small_files_come_through_the_cache(
    web: Web, cache: InputCache, tmp_path: Path
) -> None:
    files = files_on(web, 600)
    first = Job(tmp_path, cache, "one").fetch(files, grants(web, files))
    again = Job(tmp_path, cache, "two").fetch(files, grants(web, files))
    assert first == again == {f"f{n}": f"content {n}".encode() for n in range(600)}
    assert len(web.requests) == 600


def test_i33_jobs_that_want_the_same_files_at_once_download_each_once(
    web: Web, cache: InputCache, tmp_path: Path
) -> None:
    files = files_on(web, 300)
    jobs = [Job(tmp_path, cache, f"job{number}") for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda job: job.fetch(files, grants(web, files)), jobs))
    assert all(len(one) == 300 for one in found)
    assert len(web.requests) == 300


def test_i33_files_with_one_content_are_downloaded_once(
    web: Web, cache: InputCache, tmp_path: Path
) -> None:
    files = files_on(web, 40, contents=4)
    assert len(Job(tmp_path, cache).fetch(files, grants(web, files))) == 40
    assert len(web.requests) == 4


def test_a_file_that_the_lane_gives_back_does_not_wait_for_the_others(
    web: Web, cache: InputCache, tmp_path: Path
) -> None:
    """Its name is free at once: the slow file ends only when the other one has come by the ordinary way."""
    files = files_on(web, 2)
    good, done = web.answers["/0"][0], threading.Event()

    def at_last(handler: Any) -> None:
        good(handler)
        done.set()

    slow = web.answers["/1"][0]

    def after_the_other(handler: Any) -> None:
        assert done.wait(30)
        slow(handler)

    web.answers["/0"] = [answers.status(503), at_last]
    web.answers["/1"] = [after_the_other]
    job = Job(tmp_path, cache)
    assert len(job.fetch(files, grants(web, files))) == 2
    assert not [line for line in job.said if "waiting" in line]


def test_grants_are_asked_for_as_they_are_needed(
    web: Web, cache: InputCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_lane, "AT_ONCE", 20)
    files = files_on(web, 1100)
    known = grants(web, files)
    requests_before: list[int] = []

    def renew(ids: list[str]) -> dict[str, Transfer]:
        requests_before.append(len(web.requests))
        return {one: known[one] for one in ids}

    assert len(Job(tmp_path, cache).fetch(files, {}, renew)) == 1100
    assert requests_before[0] == 0
    assert requests_before[1] > 0


def test_when_nobody_answers_any_more_nothing_else_is_asked_for(
    web: Web, cache: InputCache, tmp_path: Path
) -> None:
    """A stop while grants are waited for: one question, not one for each file."""
    files = files_on(web, 1000)
    questions: list[int] = []

    def renew(ids: list[str]) -> dict[str, Transfer]:
        questions.append(len(ids))
        raise NoGrants("the execution is ending")

    with pytest.raises(InputError, match=r"1000 of 1000 input files failed.*is ending"):
        Job(tmp_path, cache).fetch(files, {}, renew)
    assert questions == [500]


def test_few_descriptors_are_enough(web: Web, cache: InputCache, tmp_path: Path) -> None:
    files = files_on(web, 400)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))  # of this process already
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 150, hard))
    try:
        assert len(Job(tmp_path, cache).fetch(files, grants(web, files))) == 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_a_cache_small_files_come_too(web: Web, tmp_path: Path) -> None:
    files = files_on(web, 50)
    assert len(Job(tmp_path, None).fetch(files, grants(web, files))) == 50


@pytest.mark.skipif(not RANGES, reason="elsewhere: the system has no locks of open files")
def test_names_are_held_by_one_descriptor_and_by_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "names"
    digests = [name_digest(str(number)) for number in range(3)]
    with HeldNames(path) as ours, HeldNames(path) as theirs:
        assert [ours.take(digest) for digest in digests] == [True] * 3
        assert not ours.take(digests[0])  # one job asks for one content twice
        assert not theirs.take(digests[0])
        ours.give_back(digests[0])
        assert theirs.take(digests[0])
        ours.give_back(digests[0])  # it is theirs now
        assert not ours.take(digests[0])
    with HeldNames(path) as third:
        assert all(third.take(digest) for digest in digests)
