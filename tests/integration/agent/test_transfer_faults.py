"""Large files and servers that misbehave: what arrives is right, or the error says what was wrong."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.unruly import Unruly, unruly
from valohai_agent.errors import ChecksumMismatch, Denied, Refused, TransferError, Unreachable
from valohai_agent.protocol import Checksums, Parts, Transfer
from valohai_agent.transfer import Transferer
from valohai_agent.transfers import download, ranges, upload
from valohai_agent.transfers.wire import Patience

MB = 1024 * 1024
DATA = os.urandom(3 * MB + 17)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def transferer(pauses: list[float]) -> Iterator[Transferer]:
    patience = Patience(connect_seconds=2, read_seconds=2, window_seconds=0.3)
    made = Transferer(attempts=3, sleep=pauses.append, patience=patience)
    yield made
    made.close()


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection counts as slow, and ranges are small: files of a test go by several connections."""
    monkeypatch.setattr(ranges, "FAST_BYTES_PER_SECOND", 1e15)
    monkeypatch.setattr(ranges, "SPLIT_BYTES", 256 * 1024)
    monkeypatch.setattr(download, "SPLIT_BYTES", 256 * 1024)
    monkeypatch.setattr(download, "RANGE_BYTES", 256 * 1024)
    monkeypatch.setattr(upload, "SPLIT_BYTES", 256 * 1024)
    original = ranges.Ranges

    class Small(original):
        def __init__(self, total: int, *, start: int = 0, size: int = 256 * 1024) -> None:
            super().__init__(total, start=start, size=size)

    monkeypatch.setattr(download, "Ranges", Small)


def fetch(transferer: Transferer, server: Unruly, target: Path, **options: Any) -> bytes:
    options.setdefault("expected", Checksums(sha256=hashlib.sha256(server.data).hexdigest()))
    transferer.download(server.get(), target / "f", name="input 'f'", **options)
    assert os.listdir(target) == ["f"]
    return (target / "f").read_bytes()


# -- downloads -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("split")
def test_a_large_file_comes_by_several_connections_and_all_checksums_are_right(
    transferer: Transferer, tmp_path: Path
) -> None:
    seen: list[tuple[int, int | None]] = []
    with unruly(data=DATA) as server:
        moved = transferer.download(
            server.get(), tmp_path / "f", name="f", progress=lambda *now: seen.append(now)
        )
        assert server.connections > 1
        ranged = [headers["Range"] for _, _, headers in server.requests if "Range" in headers]
    assert len(ranged) == len(set(ranged)) >= 8
    assert (tmp_path / "f").read_bytes() == DATA
    assert moved.checksums == Checksums(
        md5=hashlib.md5(DATA).hexdigest(), sha1=hashlib.sha1(DATA).hexdigest(), sha256=SHA256
    )
    assert seen[-1] == (len(DATA), len(DATA))


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("every", [70_000, 200_000, 1_000_000])
def test_a_connection_reset_every_so_many_bytes_goes_on_where_it_broke_off(
    transferer: Transferer, tmp_path: Path, every: int
) -> None:
    with unruly(data=DATA, reset_every=every) as server:
        assert fetch(transferer, server, tmp_path) == DATA


def test_a_reset_stream_goes_on_in_the_middle(transferer: Transferer, tmp_path: Path) -> None:
    with unruly(data=DATA, reset_every=1_000_000) as server:
        assert fetch(transferer, server, tmp_path) == DATA
        assert server.requests[-1][2]["If-Range"] == '"v1"'


@pytest.mark.usefixtures("split")
def test_a_storm_of_503_is_waited_out(
    transferer: Transferer, tmp_path: Path, pauses: list[float]
) -> None:
    with unruly(data=DATA, storm=2) as server:
        assert fetch(transferer, server, tmp_path) == DATA
    assert len(pauses) == 2


def test_a_storm_that_does_not_end_is_told_with_its_reason(
    transferer: Transferer, tmp_path: Path
) -> None:
    with (
        unruly(data=DATA, storm=1000) as server,
        pytest.raises(Unreachable, match=r"HTTP 503 .*\(SlowDown\) from 127.*tried 3 times"),
    ):
        fetch(transferer, server, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_server_that_drips_is_given_up(transferer: Transferer, tmp_path: Path) -> None:
    with (
        unruly(data=DATA, drip=True, etag=None) as server,
        pytest.raises(Unreachable, match=r"slower than 1024 bytes/s"),
    ):
        fetch(transferer, server, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_server_that_breaks_off_after_each_byte_is_given_up(
    transferer: Transferer, tmp_path: Path, pauses: list[float]
) -> None:
    with (
        unruly(data=DATA, reset_every=1) as server,
        pytest.raises(Unreachable, match="tried 3 times"),
    ):
        fetch(transferer, server, tmp_path)
    assert (len(server.requests), len(pauses)) == (3, 2)


@pytest.mark.usefixtures("split")
def test_a_signature_that_runs_out_on_the_way_is_renewed(
    transferer: Transferer, tmp_path: Path
) -> None:
    asked: list[int] = []
    with unruly(data=DATA, expires_after=4) as server:

        def renew() -> Transfer:
            asked.append(1)
            return server.get("fresh")

        assert fetch(transferer, server, tmp_path, renew=renew) == DATA
    assert asked == [1]


@pytest.mark.usefixtures("split")
def test_a_signature_that_cannot_be_renewed_is_denied_and_no_secret_shows(
    transferer: Transferer, tmp_path: Path
) -> None:
    with (
        unruly(data=DATA, expires_after=4) as server,
        pytest.raises(Denied, match=r"HTTP 403 .*\(AccessDenied\) from 127") as caught,
    ):
        fetch(transferer, server, tmp_path, renew=lambda: server.get("stale"))
    assert "secret" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("split")
def test_content_that_changes_on_the_way_is_noticed_and_read_anew(
    transferer: Transferer, tmp_path: Path
) -> None:
    with unruly(data=DATA, change_after=4) as server:
        moved = transferer.download(server.get(), tmp_path / "f", name="f")
    assert (tmp_path / "f").read_bytes() == DATA[::-1]
    assert moved.etag == '"v2"'


@pytest.mark.usefixtures("split")
def test_content_that_changes_is_no_match_when_another_is_expected(
    transferer: Transferer, tmp_path: Path
) -> None:
    with unruly(data=DATA, change_after=4) as server, pytest.raises(ChecksumMismatch):
        fetch(transferer, server, tmp_path, expected=Checksums(sha256=SHA256))
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("split")
def test_wrong_checksum_of_a_large_file_leaves_nothing(
    transferer: Transferer, tmp_path: Path
) -> None:
    with unruly(data=DATA) as server, pytest.raises(ChecksumMismatch, match="has sha1"):
        fetch(transferer, server, tmp_path, expected=Checksums(sha1="0" * 40))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("claimed", [len(DATA) + 1000, 100])
def test_a_wrong_length_is_no_success(transferer: Transferer, tmp_path: Path, claimed: int) -> None:
    with unruly(data=DATA, claimed=claimed, etag=None) as server, pytest.raises(TransferError):
        fetch(transferer, server, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("faults", [{"ranges": False}, {"chunked": True}, {"etag": None}])
def test_servers_without_ranges_lengths_or_etags_are_read_by_one_connection(
    transferer: Transferer, tmp_path: Path, faults: dict[str, Any]
) -> None:
    with unruly(data=DATA, **faults) as server:
        assert fetch(transferer, server, tmp_path, expected=None) == DATA
        assert server.connections == 1


def test_connections_are_kept_for_the_next_file(transferer: Transferer, tmp_path: Path) -> None:
    with unruly(data=b"x" * 1000) as server:
        for number in range(20):
            transferer.download(server.get(), tmp_path / str(number), name="f")
        assert server.connections == 1


@pytest.mark.parametrize("size", [1000, 64 * MB])
def test_cancelling_ends_a_download_that_hangs(tmp_path: Path, size: int) -> None:
    cancelled = threading.Event()
    transferer = Transferer(cancelled=cancelled)
    with unruly(data=bytes(size), drip=True) as server:

        def cancel() -> None:
            server.dripped.wait()
            cancelled.set()

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(Unreachable, match="cancelled"):
            transferer.download(server.get(), tmp_path / "f", name="f")
        thread.join()
    assert os.listdir(tmp_path) == []


def test_a_disk_limit_is_told_at_once(tmp_path: Path) -> None:
    """RLIMIT_FSIZE in a process of its own: the write fails as on a full disk's quota."""
    with unruly(data=DATA) as server:
        done = _alone(
            f"""
            import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000000, 1000000))
            from pathlib import Path
            from valohai_agent.errors import TransferError
            from valohai_agent.protocol import Transfer
            from valohai_agent.transfer import Transferer
            try:
                Transferer().download(
                    Transfer(url={server.url()!r}), Path({str(tmp_path)!r}) / "f", name="f"
                )
            except TransferError as error:
                print(error)
            """
        )
        assert "f: cannot be written (File too large)" in done
        assert server.count("GET") == 1
    assert os.listdir(tmp_path) == []


# -- uploads -------------------------------------------------------------------------------------------

PART = 256 * 1024
LAST = -(-len(DATA) // PART)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.write_bytes(DATA)
    return path


def more_of(server: Unruly, style: str, signature: str = "") -> Callable[[int, int], Parts]:
    def more(first: int, count: int) -> Parts:
        numbers = range(first, first + count)
        return server.some_parts(style, PART, numbers, signature=signature)

    return more


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("style", ["s3", "azure"])
def test_o17_a_large_file_goes_in_parts_that_are_asked_for_as_needed(
    transferer: Transferer, source: Path, style: str
) -> None:
    with unruly() as server:
        grant = server.grant(style, PART, range(1, 4))
        moved = transferer.upload(source, grant, name="o", more=more_of(server, style))
        assert server.stored == DATA
        assert server.connections > 1
        text = server.list_sent.decode()
    assert (moved.size, moved.checksums.sha256) == (len(DATA), SHA256)
    assert text.count("<Part>" if style == "s3" else "<Latest>") == LAST
    assert ('"part3"' if style == "s3" else "MDAwMDAz") in text


@pytest.mark.usefixtures("split")
def test_o17_segments_are_joined_by_the_control_plane(transferer: Transferer, source: Path) -> None:
    asked: list[tuple[int, int]] = []
    with unruly() as server:

        def more(first: int, count: int) -> Parts:
            asked.append((first, count))
            return server.some_parts("swift", PART, range(first, first + count))

        transferer.upload(source, server.grant("swift", PART, range(1, 11)), name="o", more=more)
        assert b"".join(server.parts[number] for number in sorted(server.parts)) == DATA
    assert asked == [(11, LAST - 10), (LAST + 1, 0)]


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize(
    "faults",
    [
        {"storm": 2},
        {"reset_every": 100_000, "resets": 2},
        {"finish_error": 1},
        {"lose_finish": 1},
        {"storm": 1, "storm_status": 429},
    ],
)
def test_parts_survive_resets_storms_and_lost_answers(
    transferer: Transferer, source: Path, faults: dict[str, int]
) -> None:
    with unruly(**faults) as server:
        moved = transferer.upload(
            source, server.grant("s3", PART, range(1, LAST + 1)), name="o", more=None
        )
        assert server.stored == DATA
    assert moved.checksums.sha256 == SHA256


@pytest.mark.usefixtures("split")
def test_parts_whose_signature_ran_out_are_asked_for_again(
    transferer: Transferer, source: Path
) -> None:
    with unruly(expires_after=5) as server:
        grant = server.grant("s3", PART, range(1, LAST + 1))
        transferer.upload(source, grant, name="o", more=more_of(server, "s3", "fresh"))
        assert server.stored == DATA


@pytest.mark.usefixtures("split")
def test_a_denied_part_ends_the_upload_and_nothing_is_finished(
    transferer: Transferer, source: Path
) -> None:
    with unruly(signature="other") as server:
        grant = server.grant("s3", PART, range(1, LAST + 1))
        with pytest.raises(Denied):
            transferer.upload(source, grant, name="o", more=more_of(server, "s3", "stale"))
        assert server.stored is None


@pytest.mark.parametrize("arrived", [0, 100_000])
def test_a_session_goes_on_from_where_it_says_it_is(
    transferer: Transferer, source: Path, arrived: int
) -> None:
    with unruly(session_reset=2, lose_chunks=arrived) as server:
        moved = transferer.upload(source, server.grant("session", PART), name="o")
        assert server.stored == DATA
        queries = [h["Content-Range"] for _, _, h in server.requests if "*" in h["Content-Range"]]
    assert len(queries) == 2
    assert moved.checksums.sha256 == SHA256


def test_an_empty_file_ends_its_session(transferer: Transferer, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with unruly() as server:
        transferer.upload(tmp_path / "empty", server.grant("session", PART), name="o")
        assert server.stored == b""


@pytest.mark.parametrize("style", ["s3", "session"])
def test_a_file_that_changes_while_it_is_uploaded_is_no_output(
    transferer: Transferer, source: Path, style: str
) -> None:
    def change(done: int, total: int | None) -> None:
        os.utime(source, ns=(1, done))

    with unruly() as server:
        grant = server.grant(style, PART, range(1, LAST + 1))
        with pytest.raises(Refused, match="changed while it was uploaded"):
            transferer.upload(source, grant, name="o", progress=change)
        assert style == "session" or server.stored is None


def test_a_file_that_becomes_shorter_is_no_output(transferer: Transferer, source: Path) -> None:
    def cut(done: int, total: int | None) -> None:
        os.truncate(source, 10)

    with unruly() as server, pytest.raises(Refused, match="became shorter"):
        transferer.upload(
            source, server.grant("s3", PART, range(1, LAST + 1)), name="o", progress=cut
        )


# -- memory --------------------------------------------------------------------------------------------


def _alone(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_memory_stays_bounded_while_hundreds_of_megabytes_move(tmp_path: Path) -> None:
    """In a process of its own: 256 MB both ways must not grow it by more than a tenth of that."""
    size = 256 * MB
    with unruly(data=bytes(size)) as server:
        grant = server.grant("s3", 16 * MB, range(1, 17))
        server.parts = _Forgetful()
        grown = _alone(
            f"""
            import resource
            from pathlib import Path
            from valohai_agent.protocol import Transfer, UploadGrant
            from valohai_agent.transfer import Transferer
            from valohai_agent.transfers import ranges
            ranges.FAST_BYTES_PER_SECOND = 1e15
            peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            transferer, target = Transferer(), Path({str(tmp_path)!r}) / "f"
            before = peak()
            transferer.download(Transfer(url={server.url()!r}), target, name="f", size={size})
            grant = UploadGrant.model_validate_json({grant.model_dump_json()!r})
            transferer.upload(target, grant, name="f")
            print((peak() - before) * 1024)
            """
        )
        assert server.stored is not None
    assert int(grown) < size / 10


class _Forgetful(dict[int, bytes]):
    """Parts whose content nobody wants."""

    def __setitem__(self, number: int, body: bytes) -> None:
        super().__setitem__(number, b"")
