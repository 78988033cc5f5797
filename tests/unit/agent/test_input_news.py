"""What is said about inputs, however many files they have (I-31, I-32)."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

import pytest

from valohai_agent.input_news import MANY_FILES, SHOWN_FILES, InputNews
from valohai_agent.input_plan import InputFile, Placed
from valohai_agent.protocol import (
    MAX_INPUTS_READY,
    Checksums,
    InputReady,
    InputsReady,
    JobFile,
)


def files_of(name: str, count: int) -> list[InputFile]:
    return [
        InputFile(
            input=name,
            file=JobFile(id=f"{name}.{n}", name=f"{n}", uri=f"s3://b/{n}", size=10),
            path=PurePosixPath(name) / str(n),
        )
        for n in range(count)
    ]


class Rig:
    def __init__(self, files: list[InputFile], *, batches: bool = True) -> None:
        self.lines: list[str] = []
        self.reports: list[InputReady | InputsReady] = []
        self.progress: list[tuple[int, int | None]] = []
        self.news = InputNews(
            Counter(item.input for item in files),
            shown=lambda item: f"/valohai/inputs/{item.path}",
            status=self.lines.append,
            report=self.reports.append,
            batches=batches,
            progress=lambda done, total: self.progress.append((done, total)),
            total=10 * len(files),
        )
        for number, item in enumerate(files):
            for done in (3, 7, 10):
                self.news.moved(item, done)
            checksums = Checksums(md5="m", sha1="s", sha256="h")
            cached = number % 4 == 0
            self.news.ready(item, Placed(size=10, checksums=checksums, cached=cached))
        self.news.close()

    @property
    def ready(self) -> list[InputReady]:
        return [
            one
            for report in self.reports
            for one in ([report] if isinstance(report, InputReady) else report.files)
        ]


def test_i31_up_to_a_hundred_files_have_their_lines_each() -> None:
    rig = Rig(files_of("d", MANY_FILES))
    assert len(rig.lines) == MANY_FILES // 4 + 3 * MANY_FILES // 4 * 4
    assert rig.lines[0] == "/valohai/inputs/d/0: from cache, 10 B"
    assert rig.lines[1:5] == [
        "/valohai/inputs/d/1: downloaded, 10 B",
        "/valohai/inputs/d/1: md5 sum: m",
        "/valohai/inputs/d/1: sha1 sum: s",
        "/valohai/inputs/d/1: sha256 sum: h",
    ]


def test_i31_of_more_files_the_first_are_listed_and_the_rest_summed_up() -> None:
    rig = Rig([*files_of("many", 5000), *files_of("few", 2)])
    listed = [line for line in rig.lines if ": downloaded" in line or ": from cache" in line]
    assert len(listed) == SHOWN_FILES + 2
    assert f"input 'many': {5000 - SHOWN_FILES:,} more files are not listed here" in rig.lines
    summary = "input 'many': 5,000 files, 50.0 kB; 3,750 downloaded, 1,250 from cache"
    assert rig.lines[-1] == summary
    assert len(rig.lines) < 60


@pytest.mark.parametrize("batches", [True, False])
def test_i32_every_use_is_reported_once_in_few_reports_where_that_is_understood(
    batches: bool,
) -> None:
    files = files_of("d", 1001)
    rig = Rig(files, batches=batches)
    assert [one.file_id for one in rig.ready] == [item.file.id for item in files]
    assert (len(rig.reports) <= 1001 // MAX_INPUTS_READY + 5) is batches
    assert all(isinstance(one, InputReady) for one in rig.reports) is not batches


def test_all_files_and_those_from_a_cache_are_one_line() -> None:
    assert Rig(files_of("d", 9)).news.words() == "inputs: 9 files, 3 from cache"
    assert Rig(files_of("d", 1)).news.words() == "inputs: 1 file, 1 from cache"
    assert Rig([]).news.words() is None


def test_one_file_needs_no_batch() -> None:
    assert isinstance(Rig(files_of("d", 1)).reports[0], InputReady)


def test_progress_is_paced_and_ends_with_everything() -> None:
    rig = Rig(files_of("d", 5000))
    assert rig.progress[-1] == (50_000, 50_000)
    assert len(rig.progress) < 500
    assert [done for done, _ in rig.progress] == sorted(done for done, _ in rig.progress)
