"""Outputs become datums, whatever user code left in the directory (CONTRACT 6)."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest

from tests.support.output_rig import Rig
from tests.support.unruly import unruly
from valohai_agent.errors import OutputError
from valohai_agent.log_files import upload_logs
from valohai_agent.outputs import OutputSummary
from valohai_agent.protocol import (
    Checksums,
    GrantRequest,
    Grants,
)
from valohai_agent.runtimes.base import Elsewhere
from valohai_agent.transfer import Transferer


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_v06_o01_files_keep_their_directories_in_the_name(rig: Rig) -> None:
    rig.write("results/model.pkl", b"model")
    rig.write("a.txt", b"a")
    (rig.outputs / "empty-directory").mkdir()
    summary = rig.finish()
    assert rig.names() == ["a.txt", "results/model.pkl"]
    assert (summary.stored, summary.bytes, summary.problems) == (2, 6, [])
    report = next(r for r in rig.reports if r.name == "a.txt")
    assert rig.stored(report) == b"a"
    assert report.checksums.md5 == "0cc175b9c0f1b6a831c399e269772661"
    assert report.checksums.sha1
    assert report.checksums.sha256
    assert report.file_mtime is not None


def test_no_outputs_are_no_problem(rig: Rig) -> None:
    assert rig.finish() == OutputSummary()


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "ünïcödé/日本",
        "-rf",
        "--",
        "new\nline",
        "tab\tquote'\"",
        "trailing ",
        "back\\slash",
        "%41?#&=+",
        ".hidden",
        "a" * 255,
        "*.py",
    ],
)
def test_odd_names_survive(rig: Rig, name: str) -> None:
    rig.write(name, b"data")
    assert rig.finish().problems == []
    assert rig.names() == [name]
    assert rig.stored(rig.reports[0]) == b"data"
    assert all("\n" not in line for line in rig.status)


def test_a_name_that_is_no_utf8_is_stored_with_replacement_characters(rig: Rig) -> None:
    with open(os.fsencode(rig.outputs) + b"/bad\xff", "wb") as file:
        file.write(b"x")
    assert rig.finish().problems == []
    assert rig.names() == ["bad\ufffd"]
    assert rig.reports[0].model_dump_json()


def test_o16_empty_files_are_stored(rig: Rig) -> None:
    rig.write("empty", b"")
    rig.finish()
    assert rig.reports[0].size == 0
    assert rig.reports[0].checksums.md5 == "d41d8cd98f00b204e9800998ecf8427e"


def test_o16_links_within_the_job_are_followed(rig: Rig) -> None:
    rig.write("real", b"content")
    (rig.workspace.repository / "model.bin").write_bytes(b"from the repository")
    (rig.outputs / "sub").mkdir()
    (rig.outputs / "relative").symlink_to("real")
    (rig.outputs / "absolute").symlink_to("/valohai/repository/model.bin")
    (rig.outputs / "sub/up").symlink_to("../../repository/./model.bin")
    (rig.outputs / "chain").symlink_to("absolute")
    rig.finish()
    by_name = {report.name: rig.stored(report) for report in rig.reports}
    assert by_name == {
        "real": b"content",
        "relative": b"content",
        "absolute": b"from the repository",
        "sub/up": b"from the repository",
        "chain": b"from the repository",
    }


def test_o16_what_links_lead_to_in_the_container_is_kept_once_under_each_name(rig: Rig) -> None:
    files: dict[str, bytes | Elsewhere | str] = {"/opt/m/w.bin": b"weights"}
    files["/opt/final"] = Elsewhere(path="/valohai/repository/r")
    asked: list[str] = []

    def copy_out(path: str, target: Path) -> Elsewhere | str | None:
        asked.append(path)
        found = files.get(path, "which does not exist in the container")
        if not isinstance(found, bytes):
            return found
        target.write_bytes(found)
        return None

    files["/opt/link"] = Elsewhere(path="/opt/m/w.bin")
    (rig.workspace.repository / "r").write_bytes(b"from the repository")
    (rig.outputs / "sub").mkdir()
    (rig.outputs / "w.bin").symlink_to("/opt/m/w.bin")
    (rig.outputs / "sub/again").symlink_to("../../../opt/m/w.bin")
    (rig.outputs / "chain").symlink_to("/opt/link")
    (rig.outputs / "back").symlink_to("/opt/final")
    (rig.outputs / "broken").symlink_to("/opt/none")
    rig.collector.keep_linked(copy_out)
    assert rig.finish().problems == []
    assert {report.name: rig.stored(report) for report in rig.reports} == {
        "w.bin": b"weights",
        "sub/again": b"weights",
        "chain": b"weights",
        "back": b"from the repository",
    }
    assert asked.count("/opt/m/w.bin") == 2  # directly, and through /opt/link
    [warning] = rig.warnings
    assert "'broken' is a link to '/opt/none', which does not exist in the container" in warning


def test_o18_a_linked_file_that_cannot_be_kept_is_a_problem_and_the_rest_is_stored(
    rig: Rig,
) -> None:
    def copy_out(path: str, target: Path) -> Elsewhere | str | None:
        raise OutputError("no space left on device")

    rig.write("good")
    (rig.outputs / "w.bin").symlink_to("/opt/m/w.bin")
    rig.collector.keep_linked(copy_out)
    assert rig.finish().problems == ["Output 'w.bin' could not be stored: no space left on device."]
    assert rig.names() == ["good"]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("/etc/passwd", "'/etc/passwd', outside the job's directories"),
        ("../../../../../../../../../etc/passwd", "'/etc/passwd', outside"),
        ("/valohai/../etc/passwd", "'/etc/passwd', outside"),
        ("/valohai/run/command", "'/valohai/run/command', outside"),
        ("../run/command", "outside"),
        ("/valohai/outputs/../../etc/hosts", "'/etc/hosts', outside"),
        ("nothing", "'/valohai/outputs/nothing', which does not exist"),
        ("/valohai/outputs", "'/valohai/outputs', a directory"),
        ("/valohai", "a directory"),
        (".", "a directory"),
        ("loop", "which leads back to itself"),
        ("directory-link/passwd", "'/etc/passwd', outside"),
        ("pipe", "'/valohai/outputs/pipe', which is no regular file"),
    ],
)
def test_o16_links_out_of_the_tree_are_skipped_with_a_warning(
    rig: Rig, target: str, reason: str
) -> None:
    rig.write("good")
    (rig.workspace.run / "command").write_text("secret script")
    (rig.outputs / "directory-link").symlink_to("/etc")
    os.mkfifo(rig.outputs / "pipe")
    (rig.outputs / "loop").symlink_to(target)
    summary = rig.finish()
    assert rig.names() == ["good"]
    assert summary.problems == []
    [warning] = [text for text in rig.warnings if "'loop'" in text]
    assert reason in warning


def test_o16_sockets_and_fifos_are_skipped_with_a_warning(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(rig.outputs / "pipe")
    monkeypatch.chdir(rig.outputs)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("sock")
    rig.write("good")
    assert rig.finish().problems == []
    assert rig.names() == ["good"]
    assert sorted(rig.warnings) == [
        "Output 'pipe' is a FIFO; it is not uploaded.",
        "Output 'sock' is a socket; it is not uploaded.",
    ]


def test_root_owned_0700_directories_are_opened(rig: Rig) -> None:
    path = rig.write("private/secret", mode=0o000)
    path.parent.chmod(0o000)
    collector = rig.new_collector()
    from valohai_agent.trees import open_tree

    collector._make_readable = open_tree
    assert collector.finish().problems == []
    assert rig.names() == ["private/secret"]


# -- live outputs ----------------------------------------------------------------------------------


def test_v07_o03_a_read_only_file_is_taken_and_its_path_can_be_used_again(rig: Rig) -> None:
    for round_number in range(3):
        rig.write("x", f"round {round_number}", mode=0o444)
        assert rig.collector.scan_now() == 1
        assert not (rig.outputs / "x").exists()
    rig.write("x", "at the end")
    rig.finish()
    assert [rig.stored(report) for report in rig.reports] == [
        b"round 0",
        b"round 1",
        b"round 2",
        b"at the end",
    ]
    assert [report.live for report in rig.reports] == [True, True, True, False]
    assert len({report.upload_id for report in rig.reports}) == 4


def test_o05_writable_files_and_read_only_directories_are_no_signal(rig: Rig) -> None:
    rig.write("d/x")
    (rig.outputs / "d").chmod(0o555)
    assert rig.collector.scan_now() == 0
    (rig.outputs / "d").chmod(0o755)


def test_a_file_that_is_still_being_copied_is_left_alone(rig: Rig) -> None:
    path = rig.write("x", mode=0o444)
    rig.seconds = path.stat().st_mtime + 0.1
    assert rig.collector.scan_now() == 0
    rig.seconds += 1
    assert rig.collector.scan_now() == 1


def test_a_read_only_link_is_never_taken_live(rig: Rig) -> None:
    (rig.outputs / "l").symlink_to("/etc/passwd")
    assert rig.collector.scan_now() == 0


def test_o05_a_live_file_that_could_not_be_stored_is_stored_at_the_end(rig: Rig) -> None:
    rig.write("x", mode=0o444)
    rig.refuse["x"] = "the store is away"
    assert rig.collector.scan_now() == 0
    assert any("tried again" in line for line in rig.status)
    rig.refuse.clear()
    assert rig.finish().problems == []
    assert rig.names() == ["x"]
    assert rig.reports[0].live


def test_o04_the_thread_takes_live_files_by_itself(rig: Rig) -> None:
    arrived = threading.Event()
    rig.collector._report = lambda report: (rig.reports.append(report), arrived.set())[0]
    rig.collector.start_live(interval_seconds=0.02)
    rig.write("x", mode=0o444)
    assert arrived.wait(5)
    rig.finish()
    assert rig.names() == ["x"]


# -- sidecars --------------------------------------------------------------------------------------


def test_o06_a_sidecar_becomes_metadata_and_no_datum(rig: Rig) -> None:
    rig.write("d/m.pkl")
    rig.write("d/m.pkl.metadata.json", '{"valohai.tags": ["a"], "score": NaN}')
    rig.finish()
    assert rig.names() == ["d/m.pkl"]
    assert rig.metadata("d/m.pkl") == {"valohai.tags": ["a"], "score": "NaN"}


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', "\xff\xfe", '{"a": 1} x', "{" * 9999])
def test_o06_an_invalid_sidecar_is_stored_as_a_file_with_a_warning(rig: Rig, content: str) -> None:
    rig.write("m")
    rig.write("m.metadata.json", content.encode("latin-1"))
    assert rig.finish().problems == []
    assert rig.names() == ["m", "m.metadata.json"]
    assert rig.metadata("m") == {}
    assert rig.warnings == [
        "'m.metadata.json' is not a JSON object; it is stored as an ordinary file."
    ]


def test_o06_a_sidecar_without_its_file_is_stored_as_a_file(rig: Rig) -> None:
    rig.write("gone.metadata.json", "{}")
    rig.write(".metadata.json", "{}")
    rig.finish()
    assert rig.names() == [".metadata.json", "gone.metadata.json"]


def test_o07_jsonl_lines_are_merged_and_beat_the_sidecar(rig: Rig) -> None:
    rig.write("a")
    rig.write("a.metadata.json", '{"k": "sidecar", "s": 1}')
    lines = [
        {"file": "a", "metadata": {"k": "first", "l": 1}},
        {"file": "./a", "metadata": {"k": "second"}},
    ]
    rig.write("valohai.metadata.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n")
    rig.finish()
    assert rig.names() == ["a"]
    assert rig.metadata("a") == {"k": "second", "l": 1, "s": 1}
    assert rig.warnings == []


def test_o07_bad_jsonl_lines_are_named_and_the_good_ones_count(rig: Rig) -> None:
    rig.write("a")
    rig.write(
        "valohai.metadata.jsonl",
        '{"file": "a", "metadata": {"k": 1}}\nnonsense\n{"file": 1}\n'
        '{"file": "missing", "metadata": {}}\n',
    )
    rig.finish()
    assert rig.names() == ["a", "valohai.metadata.jsonl"]
    assert rig.metadata("a") == {"k": 1}
    assert "on line 2, 3;" in rig.warnings[0]
    assert "not in the outputs: 'missing'" in rig.warnings[1]


def test_o08_a_live_files_sidecar_goes_with_it(rig: Rig) -> None:
    rig.write("x.metadata.json", '{"n": 1}', mode=0o444)
    rig.write("x", mode=0o444)
    rig.collector.scan_now()
    rig.finish()
    assert rig.names() == ["x"]
    assert rig.metadata("x") == {"n": 1}


def test_o08_jsonl_written_after_a_live_file_replaces_its_metadata(rig: Rig) -> None:
    rig.write("x", mode=0o444)
    rig.collector.scan_now()
    rig.write("valohai.metadata.jsonl", '{"file": "x", "metadata": {"late": true}}\n')
    rig.finish()
    first, second = rig.reports
    assert first.metadata == {}
    assert second.metadata == {"late": True}
    assert first.upload_id == second.upload_id
    assert rig.warnings == []


# -- failures and scale ----------------------------------------------------------------------------


def test_o18_a_refused_output_is_a_problem_and_the_others_are_stored(rig: Rig) -> None:
    rig.write("a")
    rig.write("b")
    rig.refuse["a"] = "the store 'local' is not writable"
    summary = rig.finish()
    assert rig.names() == ["b"]
    assert summary.problems == [
        "Output 'a' could not be stored: the store 'local' is not writable."
    ]


def test_a_key_that_is_taken_gets_another_grant(rig: Rig) -> None:
    rig.write("a")
    rig.store.mkdir()
    (rig.store / "1").write_bytes(b"someone else's")
    assert rig.finish().problems == []
    assert rig.reports[0].upload_id == "2"
    assert (rig.store / "1").read_bytes() == b"someone else's"


def test_many_outputs_are_asked_for_in_batches_and_summed_up(rig: Rig) -> None:
    for number in range(1201):
        rig.write(f"f{number:04}", b"")
    summary = rig.finish()
    assert summary.stored == 1201
    assert len(rig.status) == 101
    assert rig.status[-1] == "uploaded 1201 outputs, 0 B"


class LogRig:
    """Stores the logs `stdout` and `stderr`; `pauses` are the waits between tries, which pass at once."""

    def __init__(self, rig: Rig, directory: Path) -> None:
        self.rig = rig
        self.files = {name: directory / name for name in ("stdout", "stderr")}
        for path in self.files.values():
            path.write_bytes(b"hello\n")
        self.pauses: list[float] = []
        self.end_after = 1000

    def wait(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        return len(self.pauses) >= self.end_after

    def upload(self) -> list[str]:
        stored = upload_logs(
            self.files,
            {"stdout": 1, "stderr": 1},
            transferer=Transferer(attempts=1),
            request_grants=self.rig.grant,
            warn=self.rig.warnings.append,
            wait=self.wait,
            now=lambda: sum(self.pauses),
        )
        assert {(log.size, log.lines) for log in stored} <= {(6, 1)}
        return [log.stream for log in stored]


@pytest.fixture
def logs(rig: Rig, tmp_path: Path) -> LogRig:
    return LogRig(rig, tmp_path)


def test_logs_that_cannot_be_stored_for_long_are_a_warning_only(rig: Rig, logs: LogRig) -> None:
    rig.refuse["stderr"] = "full"
    assert logs.upload() == ["stdout"]
    assert rig.warnings == [
        "Logs could not be stored, trying for 120 s more: stderr: full.",
        "The stderr log could not be stored: full.",
    ]
    assert logs.pauses[:3] == [2, 4, 8]
    assert 60 < sum(logs.pauses) <= 120
    assert [request.name for request in rig.requests].count("stdout") == 1
    assert {request.kind for request in rig.requests} == {"log"}


def test_logs_are_stored_once_their_store_is_back(rig: Rig, logs: LogRig) -> None:
    rig.store.write_text("no directory: nothing can be written there")

    def wait(seconds: float) -> bool:
        if len(logs.pauses) == 2:
            rig.store.unlink()
        return LogRig.wait(logs, seconds)

    logs.wait = wait
    assert logs.upload() == ["stdout", "stderr"]
    assert logs.pauses == [2, 4, 8]
    assert len(rig.warnings) == 1


def test_a_hard_stop_ends_the_tries_to_store_logs(rig: Rig, logs: LogRig) -> None:
    rig.refuse = {"stdout": "away", "stderr": "away"}
    logs.end_after = 1
    assert logs.upload() == []
    assert logs.pauses == [2]
    assert len(rig.warnings) == 3


def test_checksums_of_a_link_are_those_of_its_content(rig: Rig) -> None:
    rig.write("a", b"a")
    (rig.outputs / "l").symlink_to("a")
    rig.finish()
    sums: list[Checksums] = [report.checksums for report in rig.reports]
    assert sums[0] == sums[1]


# -- uploads in parts ------------------------------------------------------------------------------


def test_o17_a_large_output_goes_in_parts_and_further_ones_are_asked_for(rig: Rig) -> None:
    part, data = 100_000, os.urandom(1_050_000)
    with unruly(expires_after=6) as server:

        def grant(requests: list[GrantRequest]) -> Grants:
            rig.requests += requests
            uploads = {}
            for request in requests:
                again = request.kind == "parts"
                numbers = range(request.first, request.first + request.count) if again else (1, 2)
                signature = "fresh" if server.signature else ""
                uploads[request.id] = server.grant("s3", part, numbers, signature=signature)
            return Grants(uploads=uploads)

        rig.grant = grant
        rig.collector = rig.new_collector()
        rig.write("model.bin", data)
        assert rig.finish().problems == []
        assert server.stored == data
    asked = [request for request in rig.requests if request.kind == "parts"]
    assert {request.name for request in asked} == {"u"}
    assert asked[0].first == 3
    assert len({request.id for request in rig.requests}) == len(rig.requests)


def test_a_refused_part_is_a_problem_with_its_reason(rig: Rig) -> None:
    with unruly() as server:

        def grant(requests: list[GrantRequest]) -> Grants:
            if requests[0].kind == "parts":
                return Grants(refused={requests[0].id: "the execution has ended"})
            return Grants(uploads={requests[0].id: server.grant("s3", 100_000, (1, 2))})

        rig.grant = grant
        rig.collector = rig.new_collector()
        rig.write("model.bin", os.urandom(1_050_000))
        (problem,) = rig.finish().problems
        assert "the execution has ended" in problem
        assert server.stored is None
    assert rig.reports == []
