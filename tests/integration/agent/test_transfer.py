"""Downloads and uploads against a real HTTP server and real disks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import web as answers
from tests.support.web import Web, serve
from valohai_agent.errors import (
    ChecksumMismatch,
    Conflict,
    Denied,
    DiskFull,
    NotFound,
    Refused,
    TransferError,
    Unreachable,
)
from valohai_agent.protocol import Checksums, Transfer, UploadGrant
from valohai_agent.transfer import Transferer

DATA = os.urandom(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as server:
        yield server


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def transferer(pauses: list[float]) -> Transferer:
    return Transferer(attempts=3, timeout=(0.5, 0.3), sleep=pauses.append)


def _get(url: str, **headers: str) -> Transfer:
    return Transfer(url=url, headers=headers)


def _put(url: str) -> UploadGrant:
    return UploadGrant(upload_id="u", transfer=Transfer(url=url, method="PUT"))


def _only(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_a_download_is_hashed_and_placed_atomically(
    web: Web, transferer: Transferer, tmp_path: Path
) -> None:
    web.answers["/f"] = [answers.content(DATA, ETag='"v1"')]
    seen: list[tuple[int, int | None]] = []
    moved = transferer.download(
        _get(web.url("/f"), X_Token="t"),
        tmp_path / "f",
        name="f",
        size=len(DATA),
        expected=Checksums(sha256=SHA256),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (tmp_path / "f").read_bytes() == DATA
    assert moved.size == len(DATA)
    assert moved.checksums == Checksums(
        md5=hashlib.md5(DATA).hexdigest(), sha1=hashlib.sha1(DATA).hexdigest(), sha256=SHA256
    )
    assert moved.etag == '"v1"'
    assert seen[-1] == (len(DATA), len(DATA))
    assert _only(tmp_path) == ["f"]


@pytest.mark.parametrize(
    ("code", "error"),
    [(404, NotFound), (410, NotFound), (401, Denied), (403, Denied), (400, Refused)],
)
def test_a_final_answer_is_not_retried_and_named(
    web: Web, transferer: Transferer, tmp_path: Path, code: int, error: type[TransferError]
) -> None:
    web.answers["/f"] = [answers.status(code)]
    with pytest.raises(error, match=rf"input 'd'.*HTTP {code}.*127\.0\.0\.1"):
        transferer.download(_get(web.url("/f?sig=secret")), tmp_path / "f", name="input 'd'")
    assert web.count("GET", "/f") == 1
    assert _only(tmp_path) == []


def test_no_signature_shows_in_an_error(web: Web, transferer: Transferer, tmp_path: Path) -> None:
    for url in (web.url("/f?sig=secret"), "http://127.0.0.1:1/f?sig=secret"):
        with pytest.raises(TransferError) as caught:
            transferer.download(_get(url), tmp_path / "f", name="f")
        assert "secret" not in str(caught.value)


def test_temporary_troubles_are_retried_and_retry_after_is_honoured(
    web: Web, transferer: Transferer, tmp_path: Path, pauses: list[float]
) -> None:
    web.answers["/f"] = [
        answers.status(503, Retry_After="7"),
        answers.status(500),
        answers.content(DATA),
    ]
    transferer.download(_get(web.url("/f")), tmp_path / "f", name="f")
    assert (tmp_path / "f").read_bytes() == DATA
    assert pauses[0] == 7.0
    assert 0.5 <= pauses[1] <= 1.5


def test_a_time_out_says_so_after_its_tries(
    web: Web, transferer: Transferer, tmp_path: Path
) -> None:
    web.answers["/f"] = [answers.silence(1.0)]
    with pytest.raises(Unreachable, match=r"f: no answer within 0.3 s \(tried 3 times\)"):
        transferer.download(_get(web.url("/f")), tmp_path / "f", name="f")
    assert _only(tmp_path) == []


def test_no_connection_says_so_before_each_further_try(tmp_path: Path) -> None:
    said: list[str] = []
    transferer = Transferer(attempts=3, sleep=lambda seconds: None, waiting=said.append)
    reason = "f: no connection to 127.0.0.1:1: Connection refused"
    with pytest.raises(Unreachable, match=reason):
        transferer.download(_get("http://127.0.0.1:1/f?sig=x"), tmp_path / "f", name="f")
    assert [text.partition(", next in")[0] for text in said] == [
        f"{reason} (try 1 of 3)",
        f"{reason} (try 2 of 3)",
    ]
    assert transferer.etag(_get("http://127.0.0.1:1/f"), name="f") is None
    assert said[2:] == [f"{reason} (when asked for its version)"]


def test_a_broken_download_goes_on_where_it_stopped(
    web: Web, transferer: Transferer, tmp_path: Path
) -> None:
    web.answers["/f"] = [
        answers.broken(DATA, 2_500_000, ETag='"v1"'),
        answers.content(DATA, ETag='"v1"'),
    ]
    moved = transferer.download(_get(web.url("/f")), tmp_path / "f", name="f")
    assert moved.checksums.sha256 == SHA256
    ranged = [headers.get("Range") for _, _, headers in web.requests]
    assert ranged[0] is None
    assert ranged[1] is not None


def test_a_broken_download_without_etag_starts_again(
    web: Web, transferer: Transferer, tmp_path: Path
) -> None:
    web.answers["/f"] = [answers.broken(DATA, 2_500_000), answers.content(DATA)]
    assert transferer.download(_get(web.url("/f")), tmp_path / "f", name="f").size == len(DATA)


def test_a_wrong_checksum_leaves_nothing_behind(
    web: Web, transferer: Transferer, tmp_path: Path
) -> None:
    web.answers["/f"] = [answers.content(DATA)]
    with pytest.raises(ChecksumMismatch, match=f"sha256 {SHA256}, expected {'0' * 64}"):
        transferer.download(
            _get(web.url("/f")), tmp_path / "f", name="f", expected=Checksums(sha256="0" * 64)
        )
    assert _only(tmp_path) == []


def test_a_wrong_size_is_a_mismatch_too(web: Web, transferer: Transferer, tmp_path: Path) -> None:
    web.answers["/f"] = [answers.content(DATA)]
    with pytest.raises(ChecksumMismatch, match="expected 5"):
        transferer.download(_get(web.url("/f")), tmp_path / "f", name="f", size=5)


def test_content_encoding_is_kept_as_stored(
    web: Web, transferer: Transferer, tmp_path: Path
) -> None:
    web.answers["/f"] = [answers.content(b"\x1f\x8bnot really", Content_Encoding="gzip")]
    transferer.download(_get(web.url("/f")), tmp_path / "f", name="f")
    assert (tmp_path / "f").read_bytes() == b"\x1f\x8bnot really"


def test_cancelling_ends_the_retries(web: Web, tmp_path: Path) -> None:
    cancelled = threading.Event()
    web.answers["/f"] = [answers.status(503)]
    transferer = Transferer(sleep=lambda seconds: cancelled.set(), cancelled=cancelled)
    with pytest.raises(Unreachable, match="cancelled"):
        transferer.download(_get(web.url("/f")), tmp_path / "f", name="f")
    assert web.count("GET", "/f") == 1


# -- uploads ---------------------------------------------------------------------------------------


def test_an_upload_sends_the_file_with_its_length(
    web: Web, transferer: Transferer, tmp_path: Path
) -> None:
    web.answers["/o"] = [answers.status(503), answers.status(200, ETag='"e"')]
    (tmp_path / "o").write_bytes(DATA)
    moved = transferer.upload(tmp_path / "o", _put(web.url("/o")), name="o")
    assert web.bodies["/o"] == DATA
    assert (moved.size, moved.checksums.sha256, moved.etag) == (len(DATA), SHA256, '"e"')


def test_an_empty_file_is_sent_with_length_zero_and_not_chunked(
    web: Web, transferer: Transferer, tmp_path: Path
) -> None:
    web.answers["/o"] = [answers.status(200)]
    (tmp_path / "o").touch()
    moved = transferer.upload(tmp_path / "o", _put(web.url("/o")), name="o")
    headers = web.requests[0][2]
    assert headers["Content-Length"] == "0"
    assert "Transfer-Encoding" not in headers
    assert moved.checksums.md5 == hashlib.md5(b"").hexdigest()


@pytest.mark.parametrize("code", [409, 412])
def test_o02_an_existing_key_is_never_overwritten(
    web: Web, transferer: Transferer, tmp_path: Path, code: int
) -> None:
    web.answers["/o"] = [answers.status(code)]
    (tmp_path / "o").write_bytes(b"x")
    with pytest.raises(Conflict):
        transferer.upload(tmp_path / "o", _put(web.url("/o")), name="o")


def test_an_upload_whose_answer_was_lost_counts_when_the_key_is_taken(
    web: Web, transferer: Transferer, tmp_path: Path
) -> None:
    web.answers["/o"] = [answers.status(500), answers.status(412)]
    (tmp_path / "o").write_bytes(b"x")
    assert transferer.upload(tmp_path / "o", _put(web.url("/o")), name="o").size == 1


def test_a_full_store_is_a_full_disk(web: Web, transferer: Transferer, tmp_path: Path) -> None:
    web.answers["/o"] = [answers.status(507)]
    (tmp_path / "o").write_bytes(b"x")
    with pytest.raises(DiskFull):
        transferer.upload(tmp_path / "o", _put(web.url("/o")), name="o")


# -- file:// ---------------------------------------------------------------------------------------


def test_a_directory_store_is_written_once_and_read_back(
    transferer: Transferer, tmp_path: Path
) -> None:
    source, store = tmp_path / "o ü\n", tmp_path / "store" / "deep" / "key ü"
    source.write_bytes(DATA)
    moved = transferer.upload(source, _put(store.as_uri()), name="o")
    assert store.read_bytes() == DATA
    assert moved.checksums.sha256 == SHA256
    with pytest.raises(Conflict):
        transferer.upload(source, _put(store.as_uri()), name="o")
    assert _only(store.parent) == ["key ü"]
    back = transferer.download(_get(store.as_uri()), tmp_path / "back", name="b")
    assert back.checksums == moved.checksums


def test_a_missing_file_is_not_found(transferer: Transferer, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="d: the file does not exist"):
        transferer.download(_get((tmp_path / "no").as_uri()), tmp_path / "x", name="d")


def test_a_fifo_is_refused_and_does_not_hang(transferer: Transferer, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refused, match="not a regular file"):
        transferer.download(_get((tmp_path / "pipe").as_uri()), tmp_path / "x", name="d")


def test_a_file_url_of_another_host_is_refused(transferer: Transferer, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="other"):
        transferer.download(_get("file://other/etc/passwd"), tmp_path / "x", name="d")


@contextlib.contextmanager
def _small_disk(directory: Path) -> Iterator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path, namespaces: None) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("elsewhere: mounting a small disk needs root")
    with _small_disk(tmp_path / "small") as disk:
        yield disk


def test_a_full_disk_while_downloading_says_so_and_leaves_nothing(
    web: Web, transferer: Transferer, small_disk: Path
) -> None:
    web.answers["/f"] = [answers.content(DATA)]
    with pytest.raises(DiskFull, match="is full"):
        transferer.download(_get(web.url("/f")), small_disk / "f", name="f")
    assert _only(small_disk) == []
    assert web.count("GET", "/f") == 1


def test_a_disk_too_small_for_a_known_size_is_told_before_the_download(
    web: Web, transferer: Transferer, small_disk: Path
) -> None:
    with pytest.raises(DiskFull, match=f"{len(DATA)} are needed"):
        transferer.download(_get(web.url("/f")), small_disk / "f", name="f", size=len(DATA))
    assert web.requests == []


def test_a_full_store_disk_while_uploading_says_so_and_leaves_nothing(
    transferer: Transferer, small_disk: Path, tmp_path: Path
) -> None:
    (tmp_path / "o").write_bytes(DATA)
    with pytest.raises(DiskFull, match=r"output 'o'.*is full"):
        transferer.upload(tmp_path / "o", _put((small_disk / "o").as_uri()), name="output 'o'")
    assert _only(small_disk) == []


def test_a_redirect_takes_no_header_of_the_transfer_to_another_server(
    web: Web, transferer: Transferer, tmp_path: Path
) -> None:
    secrets = {"X-JFrog-Art-Api": "s1", "PRIVATE-TOKEN": "s2", "Authorization": "Basic s3"}
    with serve() as other:
        web.answers["/near"] = [answers.status(302, Location="/far")]
        web.answers["/far"] = [answers.status(307, Location=other.url("/f"))]
        other.answers["/f"] = [
            answers.broken(DATA, 100_000, ETag='"1"'),
            answers.content(DATA, ETag='"1"'),
        ]
        transferer.download(_get(web.url("/near"), **secrets), tmp_path / "f", name="f")
        seen = [headers for _, _, headers in other.requests]
    assert (tmp_path / "f").read_bytes() == DATA
    assert all(secrets.items() <= headers.items() for _, _, headers in web.requests)
    assert not [name for headers in seen for name in secrets if name in headers]
    assert (seen[-1]["Range"], seen[-1]["If-Range"]) == ("bytes=100000-", '"1"')
