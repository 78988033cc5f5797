"""Inputs come through the cache to their places (CONTRACT 5.2, 5.3)."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from tests.support import web as answers
from tests.support.web import Web, serve
from valohai_agent.cache.local import InputCache, Wanted
from valohai_agent.errors import DiskFull, InputError
from valohai_agent.inputs import InputFetcher, InputOptions
from valohai_agent.protocol import (
    Checksums,
    InputReady,
    InputsReady,
    JobFile,
    JobInput,
    Transfer,
)
from valohai_agent.transfer import Transferer
from valohai_agent.workspace import Workspace


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as server:
        yield server


class Rig:
    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path
        self.count = 0
        self.cache = InputCache(tmp_path / "cache", usage=lambda path: (1, 10**15))
        self.status: list[str] = []
        self.ready: list[InputReady] = []
        self.reports = 0
        self.new_workspace()

    def new_workspace(self) -> Workspace:
        self.count += 1
        self.workspace = Workspace.create(self.path / "work", f"e{self.count}", 1, "w")
        return self.workspace

    def source(self, name: str, data: bytes) -> Transfer:
        path = self.path / "store" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return Transfer(url=path.as_uri())

    def _ready(self, report: InputReady | InputsReady) -> None:
        self.reports += 1
        self.ready.extend([report] if isinstance(report, InputReady) else report.files)

    def fetch(
        self, inputs: list[JobInput], grants: dict[str, Transfer], **options: Any
    ) -> dict[str, Any]:
        refused, renew = options.pop("refused", None), options.pop("renew", None)
        valohai_dir = options.pop("valohai_dir", "/valohai")
        progress, packages = options.pop("progress", None), options.pop("packages", ())
        options = {"cache": self.cache, "link": valohai_dir == "/valohai", **options}
        fetcher = InputFetcher(
            self.workspace,
            valohai_dir=valohai_dir,
            transferer=Transferer(attempts=2, timeout=(1, 0.5), sleep=lambda seconds: None),
            options=InputOptions(**options),
            status=self.status.append,
            on_ready=self._ready,
            renew=renew,
            progress=progress,
        )
        return fetcher.fetch(inputs, grants, refused, packages)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.cache.close()


def _file(id: str, name: str, **fields: Any) -> JobFile:
    return JobFile(id=id, name=name, uri=fields.pop("uri", f"datum://{id}"), **fields)


def _input(name: str, *files: JobFile, **fields: Any) -> JobInput:
    return JobInput(name=name, input_id=f"id-{name}", files=list(files), **fields)


def test_k33_inputs_json_describes_what_was_placed(rig: Rig) -> None:
    data = b"x" * 28_900
    content = rig.fetch(
        [_input("d", _file("1", "sub/ü x.bin", datum_id="1", metadata=[{"k": 1}]))],
        {"1": rig.source("a", data)},
    )
    entry = content["d"]["files"][0]
    sha256 = hashlib.sha256(data).hexdigest()
    assert content["d"]["input_id"] == "id-d"
    assert entry["path"] == "/valohai/inputs/d/sub/ü x.bin"
    assert entry["size"] == 28_900
    assert entry["uri"] == "datum://1"
    assert entry["checksums"]["sha256"] == sha256
    assert entry["metadata"] == [{"k": 1}]
    assert (rig.workspace.inputs / "d/sub/ü x.bin").read_bytes() == data
    assert rig.ready[0].checksums.sha256 == sha256


def test_i20_i26_an_archive_lies_below_its_inputs_name_as_it_is(rig: Rig) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("inside"))
    rig.fetch([_input("d", _file("1", "a.tar.gz"))], {"1": rig.source("a", content.getvalue())})
    assert [path.name for path in (rig.workspace.inputs / "d").iterdir()] == ["a.tar.gz"]
    assert (rig.workspace.inputs / "d/a.tar.gz").read_bytes() == content.getvalue()


def test_i31_four_lines_per_downloaded_file_with_decimal_sizes(rig: Rig) -> None:
    rig.fetch([_input("d", _file("1", "a"))], {"1": rig.source("a", b"x" * 28_900)})
    assert rig.status[0] == "/valohai/inputs/d/a: downloaded, 28.9 kB"
    assert [line.split(": ")[1] for line in rig.status[1:]] == ["md5 sum", "sha1 sum", "sha256 sum"]


def test_k35_i37_every_declared_input_is_listed_and_has_a_directory(rig: Rig) -> None:
    assert rig.fetch([_input("none")], {}) == {"none": {"input_id": "id-none", "files": []}}
    assert (rig.workspace.inputs / "none").is_dir()


def test_i36_on_demand_inputs_are_listed_without_a_path_and_not_downloaded(rig: Rig) -> None:
    content = rig.fetch([_input("d", _file("1", "a", size=5), download="on-demand")], {})
    assert "path" not in content["d"]["files"][0]
    assert os.listdir(rig.workspace.inputs / "d") == []


def test_i23_the_last_of_two_files_with_one_path_wins_and_the_log_says_so(rig: Rig) -> None:
    content = rig.fetch(
        [_input("d", _file("1", "a"), _file("2", "a"))],
        {"1": rig.source("x", b"first"), "2": rig.source("y", b"second")},
    )
    assert (rig.workspace.inputs / "d/a").read_bytes() == b"second"
    assert len(content["d"]["files"]) == 1
    assert any("same path /valohai/inputs/d/a" in line for line in rig.status)


def test_a_file_that_is_a_directory_of_another_is_refused(rig: Rig) -> None:
    with pytest.raises(InputError, match="has it as a part of its path"):
        rig.fetch([_input("d", _file("1", "a"), _file("2", "a/b"))], {})


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a//b", "x\0y"])
def test_a_name_that_leads_out_of_its_directory_is_refused(rig: Rig, name: str) -> None:
    with pytest.raises(InputError, match="cannot be placed"):
        rig.fetch([_input("d", _file("1", name))], {"1": rig.source("a", b"")})


def test_i33_the_second_job_takes_the_file_from_the_cache(rig: Rig) -> None:
    grants = {"1": rig.source("a", b"data")}
    inputs = [_input("d", _file("1", "a", datum_id="1"))]
    rig.fetch(inputs, grants)
    (rig.path / "store/a").unlink()
    rig.new_workspace()
    rig.fetch(inputs, grants)
    assert rig.status[-1] == "/valohai/inputs/d/a: from cache, 4 B"
    assert rig.ready[-1].cached
    assert (rig.workspace.inputs / "d/a").read_bytes() == b"data"


def test_k20_no_data_cache_downloads_again_and_refreshes_the_cache(rig: Rig) -> None:
    inputs = [_input("d", _file("1", "a", datum_id="1"))]
    rig.fetch(inputs, {"1": rig.source("a", b"old")})
    rig.new_workspace()
    rig.fetch(inputs, {"1": rig.source("a", b"new")}, no_cache=True)
    assert (rig.workspace.inputs / "d/a").read_bytes() == b"new"
    rig.new_workspace()
    rig.fetch(inputs, {})
    assert (rig.workspace.inputs / "d/a").read_bytes() == b"new"


def test_i35_an_http_file_is_cached_by_its_etag(rig: Rig, web: Web) -> None:
    inputs = [_input("d", _file("1", "a", uri="http://x/a"))]
    grants = {"1": Transfer(url=web.url("/a"))}
    web.answers["/a"] = [answers.content(b"one", ETag='"1"')]
    rig.fetch(inputs, grants)
    rig.new_workspace()
    rig.fetch(inputs, grants)
    assert rig.ready[-1].cached
    web.answers["/a"] = [answers.content(b"two", ETag='"2"')]
    rig.new_workspace()
    rig.fetch(inputs, grants)
    assert (rig.workspace.inputs / "d/a").read_bytes() == b"two"
    assert [(r.cached, r.version) for r in rig.ready] == [
        (False, '"1"'),
        (True, '"1"'),
        (False, '"2"'),
    ]


def test_an_http_file_without_identity_is_never_cached(rig: Rig, web: Web) -> None:
    web.answers["/a"] = [answers.content(b"one")]
    for _ in range(2):
        rig.fetch([_input("d", _file("1", "a"))], {"1": Transfer(url=web.url("/a"))})
        rig.new_workspace()
    assert [r.cached for r in rig.ready] == [False, False]


def test_a_cached_file_that_contradicts_the_expected_checksum_is_fetched_again(rig: Rig) -> None:
    rig.fetch([_input("d", _file("1", "a", datum_id="k"))], {"1": rig.source("a", b"old")})
    rig.new_workspace()
    expected = Checksums(sha256=hashlib.sha256(b"new").hexdigest())
    rig.fetch(
        [_input("d", _file("1", "a", datum_id="k", checksums=expected))],
        {"1": rig.source("a", b"new")},
    )
    assert (rig.workspace.inputs / "d/a").read_bytes() == b"new"


def test_without_a_read_only_view_the_job_gets_copies_of_cached_files(rig: Rig) -> None:
    file = _file("1", "a", datum_id="1")
    rig.fetch([_input("d", file)], {"1": rig.source("a", b"data")}, valohai_dir="/real/dir")
    (rig.workspace.inputs / "d/a").write_bytes(b"changed by the job")
    cached = rig.cache.find(Wanted(names=("datum:1",)))
    assert cached is not None
    assert cached.path.read_bytes() == b"data"


def test_i30_all_failed_files_are_named_with_their_reasons(rig: Rig, web: Web) -> None:
    with pytest.raises(InputError) as caught:
        rig.fetch(
            [_input("d", _file("1", "a"), _file("2", "b"), _file("3", "c"), _file("4", "d"))],
            {
                "1": Transfer(url=web.url("/missing?sig=secret")),
                "2": Transfer(url=(rig.path / "no").as_uri()),
                "4": rig.source("ok", b"ok"),
            },
            refused={"3": "the store 'cold' denies access: AccessDenied"},
        )
    message = str(caught.value)
    assert message.startswith("3 of 4 input files failed: ")
    assert "input 'd', datum://1: HTTP 404" in message
    assert "datum://2: the file does not exist" in message
    assert "datum://3: the store 'cold' denies access" in message
    assert "secret" not in message


def test_a_wrong_checksum_fails_the_input(rig: Rig) -> None:
    wrong = Checksums(sha256="0" * 64)
    with pytest.raises(InputError, match="expected 000"):
        rig.fetch([_input("d", _file("1", "a", checksums=wrong))], {"1": rig.source("a", b"x")})
    assert os.listdir(rig.workspace.inputs / "d") == []


def test_a_full_disk_stays_a_full_disk(rig: Rig) -> None:
    with pytest.raises(DiskFull, match="is full"):
        rig.fetch([_input("d", _file("1", "a", size=10**18))], {"1": rig.source("a", b"x")})


def test_an_expired_grant_is_renewed_first(rig: Rig, web: Web) -> None:
    fresh = rig.source("a", b"data")
    expired = Transfer(url=web.url("/old"), expires_at=datetime.now(timezone.utc) - timedelta(1))
    asked: list[list[str]] = []

    def renew(ids: list[str]) -> dict[str, Transfer]:
        asked.append(ids)
        return {"1": fresh}

    rig.fetch([_input("d", _file("1", "a", datum_id="1"))], {"1": expired}, renew=renew)
    assert asked == [["1"]]
    assert web.requests == []


def test_a_grant_denied_halfway_is_renewed_once(rig: Rig, web: Web) -> None:
    soon = Transfer(url=web.url("/old"), expires_at=datetime.now(timezone.utc) + timedelta(1))
    web.answers["/old"] = [answers.status(403)]
    web.answers["/new"] = [answers.content(b"data")]
    rig.fetch(
        [_input("d", _file("1", "a", datum_id="1"))],
        {"1": soon},
        renew=lambda ids: {"1": Transfer(url=web.url("/new"))},
    )
    assert (rig.workspace.inputs / "d/a").read_bytes() == b"data"


def test_progress_counts_the_bytes_of_the_whole_job(rig: Rig) -> None:
    seen: list[tuple[int, int | None]] = []
    rig.fetch(
        [_input("d", _file("1", "a", size=4), _file("2", "b", size=6))],
        {"1": rig.source("a", b"1234"), "2": rig.source("b", b"123456")},
        progress=lambda done, total: seen.append((done, total)),
    )
    assert max(seen) == (10, 10)


# -- versions -------------------------------------------------------------------------------------------------------


def _bring(rig: Rig, web: Web, known: str, content: bytes, **headers: str) -> tuple[bytes, bool]:
    """The content that a job gets for which version `known` was looked up, while the server has this; is it cached?"""
    web.answers["/a"] = [answers.content(content, **headers)]
    rig.new_workspace()
    uri = "store://x/k"
    rig.fetch(
        [_input("d", _file("1", "a", uri=uri, cache_key=f"{uri}@{known}"))],
        {"1": Transfer(url=web.url("/a"))},
    )
    return (rig.workspace.inputs / "d/a").read_bytes(), rig.ready[-1].cached


def test_i33_bytes_are_kept_under_the_version_that_their_answer_named(rig: Rig, web: Web) -> None:
    """And lineage has that version, not the one that was looked up before."""
    assert _bring(rig, web, "A", b"BBBB", ETag='"B"') == (b"BBBB", False)
    assert _bring(rig, web, "A", b"AAAA", ETag='"A"') == (b"AAAA", False)
    assert _bring(rig, web, "A", b"CCCC", ETag='"C"') == (b"AAAA", True)
    assert _bring(rig, web, "B", b"CCCC", ETag='"C"') == (b"BBBB", True)
    assert [ready.version for ready in rig.ready] == ["B", "A", "A", "B"]
    changed = [line for line in rig.status if "has changed since" in line]
    words = "has changed since the execution was created: its version is B, was A"
    assert changed == [f"/valohai/inputs/d/a: {words}. The job gets it as it is now."]


def test_i33_a_generation_counts_only_when_the_answer_names_it(rig: Rig, web: Web) -> None:
    assert _bring(rig, web, "17", b"18", ETag='"x"', x_goog_generation="18") == (b"18", False)
    assert _bring(rig, web, "17", b"y", ETag='"y"') == (b"y", False)
    assert _bring(rig, web, "17", b"z") == (b"z", False)
    assert _bring(rig, web, "17", b"17", ETag='"z"', x_goog_generation="17") == (b"17", False)
    assert _bring(rig, web, "17", b"19", ETag='"v"', x_goog_generation="19") == (b"17", True)
    assert [ready.version for ready in rig.ready] == ["18", "y", None, "17", "17"]


def test_i35_without_an_etag_size_and_time_name_the_content(rig: Rig, web: Web) -> None:
    first = {"Last_Modified": "Thu, 01 Jan 1970 00:00:10 GMT"}
    assert _bring(rig, web, "3-10", b"old", **first) == (b"old", False)
    later = {"Last_Modified": "Thu, 01 Jan 1970 00:00:11 GMT"}
    assert _bring(rig, web, "3-10", b"new", **later) == (b"old", True)
    assert _bring(rig, web, "3-12", b"new", **later) == (b"new", False)
    assert [ready.version for ready in rig.ready] == ["3-10", "3-10", "3-11"]


def test_i33_a_file_that_changes_between_the_question_and_the_download(rig: Rig, web: Web) -> None:
    inputs, grants = [_input("d", _file("1", "a"))], {"1": Transfer(url=web.url("/a"))}
    one, two = (answers.content(b"%d" % n, ETag=f'"{n}"') for n in (1, 2))
    web.answers["/a"] = [one, two, one, one]  # asked and fetched, twice
    for _ in range(2):
        rig.fetch(inputs, grants)
        rig.new_workspace()
    assert [(one.cached, one.version) for one in rig.ready] == [(False, '"2"'), (False, '"1"')]


def test_i33_a_file_of_a_directory_is_kept_under_the_size_and_time_that_it_had(rig: Rig) -> None:
    uri = "store://local/k"
    grants = {"1": rig.source("k", b"now")}
    now = (rig.path / "store/k").stat()
    found = f"3-{now.st_mtime_ns}"
    for known in ("3-17", "3-17", found, found):
        rig.new_workspace()
        rig.fetch([_input("d", _file("1", "a", uri=uri, cache_key=f"{uri}@{known}"))], grants)
    assert [ready.cached for ready in rig.ready] == [False, False, True, True]
    assert [ready.version for ready in rig.ready] == [found] * 4


@pytest.mark.parametrize("size", [3, 9])
def test_i32_an_outside_file_that_grew_or_shrank_is_taken_with_a_warning(
    rig: Rig, web: Web, size: int
) -> None:
    web.answers["/a"] = [answers.content(b"123456", ETag='"2"')]
    uri, seen = "store://x/k", list[tuple[int, "int | None"]]()
    content = rig.fetch(
        [_input("d", _file("1", "a", uri=uri, cache_key=f"{uri}@1", size=size))],
        {"1": Transfer(url=web.url("/a"))},
        progress=lambda done, total: seen.append((done, total)),
    )
    assert content["d"]["files"][0]["size"] == 6
    assert (rig.workspace.inputs / "d/a").read_bytes() == b"123456"
    assert any(f"its version is 2, was 1, it has 6 bytes, had {size}" in s for s in rig.status)
    assert seen[-1] == (6, 6)


def test_a_datum_of_another_size_is_refused(rig: Rig) -> None:
    file = _file("1", "a", datum_id="1", size=3)
    with pytest.raises(InputError, match="3"):
        rig.fetch([_input("d", file)], {"1": rig.source("a", b"1234")})


def test_i32_an_adopted_object_that_was_replaced_is_refused_and_not_kept(
    rig: Rig, web: Web
) -> None:
    """A datum never changes: the run would use, and every later one would find, what nobody has named."""
    web.answers["/a"] = [answers.content(b"hello X", ETag='"new"')]
    values = {"uri": "datum://1", "datum_id": "1", "size": 7}
    file = _file("1", "a", cache_key="datum://1@old", **values)
    with pytest.raises(InputError, match=r"replaced in its store .* its version is new, was old"):
        rig.fetch([_input("d", file)], {"1": Transfer(url=web.url("/a"))})
    web.answers["/a"] = [answers.content(b"hello 0", ETag='"old"')]
    for _ in range(2):
        rig.new_workspace()
        rig.fetch([_input("d", file)], {"1": Transfer(url=web.url("/a"))})
        assert (rig.workspace.inputs / "d/a").read_bytes() == b"hello 0"
    assert [(one.cached, one.version) for one in rig.ready] == [(False, "old"), (True, "old")]
