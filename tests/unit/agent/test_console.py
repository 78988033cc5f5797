"""Bytes in, complete files, live lines and metadata out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from valohai_agent.console import Console
from valohai_agent.metadata import parse_metadata
from valohai_agent.protocol import LogLine, LogStream


class FakeClock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> datetime:
        return datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc) + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds


class Rig:
    def __init__(self, directory: Path, secrets: tuple[str, ...] = ()) -> None:
        self.clock = FakeClock()
        self.lines: list[LogLine] = []
        self.metadata: list[dict] = []
        self.console = Console(
            directory, self.lines.extend, self.metadata.extend, self.clock, secrets
        )
        self.directory = directory

    def wait(self, seconds: float) -> None:
        self.clock.seconds += seconds
        self.console.tick()

    def shown(self, stream: str = "stdout") -> list[str]:
        return [line.m for line in self.lines if line.s.value == stream]

    def stored(self, stream: str = "stdout") -> bytes:
        return (self.directory / stream).read_bytes()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.console.close()


def test_the_stored_file_has_exactly_the_printed_bytes(rig: Rig) -> None:
    rig.console.feed("stdout", b"a\r\nb\n\n\xff\x00c")
    files = rig.console.close()
    assert rig.stored() == b"a\r\nb\n\n\xff\x00c"
    assert files["stdout"].size == 9
    assert files["stdout"].lines == 4


def test_the_last_line_without_a_newline_is_never_lost(rig: Rig) -> None:
    rig.console.feed("stderr", b"Traceback\nValueError: x")
    rig.console.close()
    assert rig.shown("stderr") == ["Traceback", "ValueError: x"]
    assert rig.console.tail("stderr") == ["Traceback", "ValueError: x"]


def test_closing_twice_gives_the_same(rig: Rig) -> None:
    rig.console.feed("stdout", b"x")
    assert rig.console.close() == rig.console.close()
    rig.console.feed("stdout", b"late")
    assert rig.stored() == b"x"


def test_m01_times_are_utc_with_microseconds_and_no_offset(rig: Rig) -> None:
    rig.console.feed("stdout", b"x\n")
    assert rig.lines[0].t == "2026-01-02T03:04:05.000000"


def test_live_lines_carry_their_offsets_in_the_stored_file(rig: Rig) -> None:
    rig.console.feed("stdout", "eins\nzwölf\n".encode())
    rig.console.feed("stdout", b"drei")
    rig.console.close()
    stored = rig.stored()
    assert [stored[line.o : line.e].decode() for line in rig.lines] == ["eins\n", "zwölf\n", "drei"]


def test_status_lines_go_to_the_stderr_file_with_a_prefix(rig: Rig) -> None:
    rig.console.feed("stderr", b"oops\n")
    rig.console.status("starting container...\nstarted container abc")
    rig.console.close()
    assert rig.stored("stderr") == (
        b"oops\n[valohai] starting container...\n[valohai] started container abc\n"
    )
    status = [line for line in rig.lines if line.s is LogStream.status]
    assert [line.m for line in status] == ["starting container...", "started container abc"]
    assert rig.stored("stderr")[status[0].o : status[0].e] == b"[valohai] starting container...\n"


def test_a_status_line_does_not_land_inside_a_line_shown_in_part(rig: Rig) -> None:
    rig.console.feed("stderr", b"waiting for it")
    rig.wait(6)
    rig.console.status("stopping")
    rig.console.feed("stderr", b" done\n")
    rig.console.close()
    assert rig.stored("stderr") == b"waiting for it\n[valohai] stopping\n done\n"


def test_v11_m02_live_view_is_limited_and_warned_once_and_the_stored_log_is_complete(
    rig: Rig,
) -> None:
    rig.console.feed("stdout", b"".join(b"line %d\n" % n for n in range(2000)))
    rig.wait(11)
    rig.console.feed("stdout", b"more\n" * 600)
    rig.console.close()
    gaps = [line for line in rig.lines if line.g]
    assert rig.shown()[:500] == [f"line {n}" for n in range(500)]
    assert [line.g for line in gaps] == [1500, 100]
    assert rig.stored()[gaps[0].o :].startswith(b"line 500\n")
    assert rig.stored()[: gaps[0].e].endswith(b"line 1999\n")
    assert rig.shown("status") == [
        "More than 50.0 events per second are being written to stdout; some are ignored."
    ]
    assert rig.stored().count(b"\n") == 2600


def test_m02_counts_each_stream_on_its_own(rig: Rig) -> None:
    rig.console.feed("stdout", b"x\n" * 600)
    rig.console.feed("stderr", b"y\n" * 400)
    assert len(rig.shown("stderr")) == 400


def test_metadata_is_read_before_the_limit(rig: Rig) -> None:
    rig.console.feed("stdout", b"".join(b'{"step": %d}\n' % n for n in range(2000)))
    assert [event["step"] for event in rig.metadata] == list(range(2000))


def test_v08_m13_metadata_events_have_a_time(rig: Rig) -> None:
    rig.console.feed("stdout", b'{"a": 1}\n{"b": 2}\n')
    time = "2026-01-02T03:04:05.000000"
    assert rig.metadata == [{"a": 1, "_time": time}, {"b": 2, "_time": time}]
    assert rig.shown() == ['{"a": 1}', '{"b": 2}']


def test_v10_m10_stderr_is_not_read_for_metadata(rig: Rig) -> None:
    rig.console.feed("stderr", b'{"a": 1}\n')
    assert rig.metadata == []


def test_metadata_in_pieces_and_without_a_last_newline(rig: Rig) -> None:
    rig.console.feed("stdout", b'{"a"')
    rig.console.feed("stdout", b": 1}")
    rig.console.close()
    assert rig.metadata[0]["a"] == 1


def test_metadata_longer_than_one_message_is_read_whole(rig: Rig) -> None:
    line = json.dumps({"matrix": list(range(30_000))}).encode()
    for start in range(0, len(line), 5000):
        rig.console.feed("stdout", line[start : start + 5000])
    rig.console.feed("stdout", b"\n")
    assert rig.metadata[0]["matrix"][-1] == 29_999
    assert rig.stored() == line + b"\n"


def test_metadata_after_a_progress_bar_that_was_shown_is_read(rig: Rig) -> None:
    rig.console.feed("stdout", b"10%\r20%\r")
    rig.wait(2)
    rig.console.feed("stdout", b'{"a": 1}\n')
    assert rig.metadata[0]["a"] == 1


def test_text_shown_before_an_object_disqualifies_the_line(rig: Rig) -> None:
    rig.console.feed("stdout", b"loss ")
    rig.wait(6)
    rig.console.feed("stdout", b'{"a": 1}\n')
    assert rig.metadata == []


def test_m05_a_progress_bar_costs_one_message_per_second(rig: Rig) -> None:
    for percent in range(100):
        rig.console.feed("stdout", b"\r%d%%" % percent)
        rig.wait(0.1)
    rig.console.feed("stdout", b"\r100%\n")
    rig.console.close()
    assert 9 <= len(rig.shown()) <= 12
    assert rig.shown()[-1] == "100%"
    assert rig.stored().count(b"\r") == 101


def test_m05_carriage_return_and_newline_are_one_line_end(rig: Rig) -> None:
    rig.console.feed("stdout", b"one\r")
    rig.wait(2)
    rig.console.feed("stdout", b"\ntwo\r\n")
    assert rig.shown() == ["one", "two"]


def test_a_prompt_without_a_line_end_is_shown_after_some_silence(rig: Rig) -> None:
    rig.console.feed("stdout", b"Proceed [y/n]? ")
    rig.wait(2)
    assert rig.shown() == []
    rig.wait(4)
    assert rig.shown() == ["Proceed [y/n]? "]


def test_m06_long_lines_are_split_between_characters(rig: Rig) -> None:
    text = "ä" * 100_000
    rig.console.feed("stdout", b"x" + text.encode())
    rig.console.close()
    assert "".join(rig.shown()) == "x" + text
    assert all(len(message.encode()) <= 64 * 1024 for message in rig.shown())
    assert rig.stored() == b"x" + text.encode()


def test_v28_k74_secrets_are_masked_everywhere(tmp_path: Path) -> None:
    rig = Rig(tmp_path, ("hunter2-long", "short", "-----BEGIN\nkeymaterial\n-----END"))
    rig.console.feed("stdout", b"short hunter2-")
    rig.wait(10)
    rig.console.feed("stdout", b'long\n{"k": "hunter2-long"}\nkeymaterial\n')
    rig.console.status("using hunter2-long")
    files = rig.console.close()
    events = gzip.decompress(files["events"].path.read_bytes())
    everything = rig.stored() + rig.stored("stderr") + events
    everything += repr(rig.lines).encode() + repr(rig.metadata).encode()
    assert b"hunter2-long" not in everything
    assert b"keymaterial" not in everything
    assert rig.stored().startswith(b"short ***\n")


def test_a_secret_across_a_split_of_a_long_line_is_masked(tmp_path: Path) -> None:
    rig = Rig(tmp_path, ("top-secret-value",))
    rig.console.feed("stdout", b"x" * (64 * 1024 - 8) + b"top-secret-value" + b"y" * 70_000)
    rig.console.close()
    assert b"secret" not in rig.stored()


def test_the_events_file_has_every_message_of_all_streams(rig: Rig) -> None:
    rig.console.status("hello")
    rig.console.feed("stdout", b"a\n" * 700)
    files = rig.console.close()
    events = gzip.decompress(files["events"].path.read_bytes()).decode().splitlines()
    assert json.loads(events[0]) == {
        "time": "2026-01-02T03:04:05.000000",
        "stream": "status",
        "message": "hello",
    }
    assert len(events) == files["events"].lines == 702


def test_m31_only_user_output_counts_as_output(rig: Rig) -> None:
    rig.clock.seconds = 5
    rig.console.status("x")
    assert rig.console.last_output_at == 0
    rig.console.feed("stderr", b"x")
    assert rig.console.last_output_at == 5
    rig.clock.seconds = 9
    rig.console.touch()
    assert rig.console.last_output_at == 9


def test_a_full_disk_stops_the_files_but_not_the_live_view(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(data: bytes, lines: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rig.console._streams["stdout"].file, "write", full)
    rig.console.feed("stdout", b"still here\n")
    rig.console.close()
    assert rig.shown() == ["still here"]
    assert "No space left" in (rig.console.write_error or "")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.binary(max_size=40), st.sampled_from([0.0, 0.4, 1.5, 6.0])), max_size=20)
)
def test_whatever_is_fed_whenever_is_stored_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[bytes, float]]
) -> None:
    rig = Rig(tmp_path_factory.mktemp("console"))
    for data, pause in pieces:
        rig.console.feed("stdout", data)
        rig.wait(pause)
    rig.console.close()
    assert rig.stored() == b"".join(data for data, _ in pieces)
    covered = 0
    for line in rig.lines:
        assert covered <= line.o <= line.e <= len(rig.stored())
        covered = line.e


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'  {"a": 1}  ', {"a": 1}),
        (b'\x1b[32m{"a": 1}\x1b[0m', {"a": 1}),
        (b'50%\r{"a": 1}', {"a": 1}),
        (b'{"a": 1} {"b": 2}', {"a": 1}),
        (
            b'{"a": NaN, "b": -Infinity, "c": 1e999}',
            {"a": "NaN", "b": "-Infinity", "c": "Infinity"},
        ),
        (b'{"a": "\\ud800"}', {"a": "?"}),
        (b'loss {"a": 1}', None),
        (b'{"a": 1} done', None),
        (b"[1, 2]", None),
        (b"{}", None),
        (b"{" * 5000, None),
        (b'{"a":' * 100_000, None),
        (b"{'a': 1}", None),
    ],
)
def test_m11_m12_what_counts_as_metadata(line: bytes, expected: dict | None) -> None:
    assert parse_metadata(line) == expected
