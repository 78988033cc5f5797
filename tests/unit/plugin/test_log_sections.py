"""Cursors over attempts: nothing lost at the hand-over, nothing shown twice."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_dagster.plugin.log_sections import (
    LogSection,
    Position,
    StoredLog,
    Stream,
    read_sections,
    stream_from,
)
from valohai_dagster.plugin.log_source import live_line, read_whole_characters


@dataclass
class FakeSource:
    content: dict[tuple[int, str], bytes] = field(default_factory=dict)

    def read(
        self, section: LogSection, stream: Stream, offset: int, limit: int | None
    ) -> tuple[bytes, int]:
        data = self.content.get((section.attempt, stream), b"")[offset:]
        data = data if limit is None else data[:limit]
        return data, offset + len(data)


def section(attempt: int, *, ended: bool = True, **sizes: int) -> LogSection:
    stored = {name: StoredLog(store="s", key="k", size=size) for name, size in sizes.items()}
    return LogSection(
        execution_id="e", attempt=attempt, title=f"attempt {attempt}", stored=stored, ended=ended
    )


def test_one_attempt_is_shown_as_it_is() -> None:
    source = FakeSource({(1, "stdout"): b"a\nb\n", (1, "stderr"): b"x\n"})
    chunk = read_sections([section(1, stdout=4, stderr=2)], None, source, None)
    assert (chunk.stdout, chunk.stderr) == (b"a\nb\n", b"x\n")
    again = read_sections([section(1, stdout=4, stderr=2)], str(chunk.position), source, None)
    assert (again.stdout, again.stderr) == (b"", b"")


def test_a_live_view_goes_on_in_the_stored_file_at_the_same_byte() -> None:
    live = FakeSource({(1, "stdout"): b"one\n"})
    chunk = read_sections([section(1, ended=False)], None, live, None)
    whole = FakeSource({(1, "stdout"): b"one\ntwo\nlast"})
    rest = read_sections([section(1, stdout=12)], str(chunk.position), whole, None)
    assert chunk.stdout + rest.stdout == b"one\ntwo\nlast"


def test_attempts_are_kept_apart_by_one_line_in_each_stream() -> None:
    source = FakeSource({(1, "stdout"): b"cut", (2, "stdout"): b"done\n"})
    sections = [section(1), section(2, stdout=5)]
    chunk = read_sections(sections, None, source, None)
    assert chunk.stdout == b"cut\n[valohai] ---- attempt 2 ----\ndone\n"
    assert chunk.stderr == b"[valohai] ---- attempt 2 ----\n"
    assert read_sections(sections, str(chunk.position), source, None).stdout == b""


def test_a_running_attempt_holds_the_next_one_back() -> None:
    source = FakeSource({(1, "stdout"): b"a", (2, "stdout"): b"b"})
    chunk = read_sections([section(1, ended=False), section(2)], None, source, None)
    assert chunk.stdout == b"a"
    assert chunk.position.section == 0


def test_an_unfinished_stored_file_holds_the_next_one_back() -> None:
    source = FakeSource({(1, "stdout"): b"ab", (2, "stdout"): b"c"})
    chunk = read_sections([section(1, stdout=4), section(2)], None, source, None)
    assert chunk.position == Position(section=0, stdout=2)


@given(
    st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=40)), min_size=1, max_size=4),
    st.integers(min_value=1, max_value=64),
)
def test_any_chunk_size_gives_the_same_text(
    attempts: list[tuple[bytes, bytes]], limit: int
) -> None:
    """Dagster asks again at once only after a full chunk, so a chunk that is not full must be the end."""
    source, sections = FakeSource(), []
    for number, (out, err) in enumerate(attempts, 1):
        source.content[number, "stdout"], source.content[number, "stderr"] = out, err
        sections.append(section(number, stdout=len(out), stderr=len(err)))
    whole = read_sections(sections, None, source, None)
    cursor, out, err = None, b"", b""
    while True:
        chunk = read_sections(sections, cursor, source, limit)
        cursor, out, err = str(chunk.position), out + chunk.stdout, err + chunk.stderr
        if len(chunk.stdout) < limit and len(chunk.stderr) < limit:
            break
    assert _texts(out) == _texts(whole.stdout)
    assert _texts(err) == _texts(whole.stderr)


def _texts(data: bytes) -> bytes:
    """Without line breaks: a divider starts a new line only when it sees that the text before did not end one."""
    return data.replace(b"\n", b"")


@pytest.mark.parametrize("cursor", ["v1/2/30/4", "v1/0/0/0", "v1/1/2/3/12:7"])
def test_cursors_survive_a_round_trip(cursor: str) -> None:
    assert str(Position.parse(cursor)) == cursor


@pytest.mark.parametrize("cursor", [None, "", "v2/1/1/1", "nonsense"])
def test_unknown_cursors_start_over(cursor: str | None) -> None:
    assert Position.parse(cursor) == Position()


def test_a_view_that_began_on_the_local_capture_keeps_its_place_there() -> None:
    assert Position.parse("12:7") == Position(local="12:7")


def test_status_lines_go_to_stderr_with_their_prefix() -> None:
    line = live_line({"s": "status", "t": "", "m": "pulling", "o": "3", "e": "21", "g": "0"})
    assert (line.stream, line.text, line.start, line.end) == (
        "stderr",
        b"[valohai] pulling\n",
        3,
        21,
    )


def test_entries_are_read_with_and_without_decoding() -> None:
    line = live_line({b"s": b"stdout", b"m": "ä".encode(), b"o": b"0", b"e": b"3"})
    assert line.text == "ä\n".encode()


def test_a_chunk_never_ends_within_a_character() -> None:
    data = "aä€😀".encode()
    for offset, limit in ((0, 2), (1, 1), (3, 1), (3, 2), (6, 1)):
        read_whole_characters(io.BytesIO(data[offset:]), limit).decode()


def test_a_stream_that_gives_little_at_a_time_is_read_to_the_limit() -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(1 if size else 0)

    assert read_whole_characters(Slow(b"abcdef"), 3) == b"abc"


def test_one_stream_of_all_sections_from_any_offset() -> None:
    """As `read_sections` joins them, whatever the offset."""
    stored = {"stdout": StoredLog(store="s", key="k", size=5)}
    sections = [
        LogSection(execution_id="e", attempt=1, title="one", stored=stored, ended=True),
        LogSection(execution_id="e", attempt=2, title="two", ended=True),
        LogSection(execution_id="e", attempt=3, title="three"),
    ]
    source = FakeSource({(1, "stdout"): b"first", (2, "stdout"): b"second\n", (3, "stdout"): b"x"})
    whole = read_sections(sections, None, source, None).stdout
    for offset in range(len(whole) + 2):
        assert b"".join(stream_from(sections, "stdout", source, offset)) == whole[offset:]
