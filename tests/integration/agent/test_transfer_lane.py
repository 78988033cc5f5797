"""Many small files by one lane: what goes well arrives whole, all else comes back for the ordinary way, nothing is left behind."""

from __future__ import annotations

import gc
import hashlib
import os
import select
import socket
import ssl
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.file_server import FileServer, serving
from tests.support.tls import Authority
from tests.support.unruly import Unruly, unruly
from valohai_agent.errors import Unreachable
from valohai_agent.protocol import Checksums, Transfer, UploadGrant
from valohai_agent.transfer import SmallDownload, SmallUpload, Transferer, Transferred
from valohai_agent.transfers import connecting, lane
from valohai_agent.transfers.upload import Source
from valohai_agent.transfers.wire import Patience, Wire

MANY = 300


@pytest.fixture
def engine() -> Iterator[Transferer]:
    engine = Transferer()
    yield engine
    engine.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    with serving(tmp_path / "http") as server:
        yield server


def wanted(url: str, target: Path, **more: Any) -> SmallDownload:
    return SmallDownload(transfer=Transfer(url=url), target=target, name=target.name, **more)


def fetch(engine: Transferer, *downloads: SmallDownload) -> dict[str, Transferred | None]:
    return {download.name: moved for download, moved in engine.download_small(downloads)}


def sha256(content: bytes) -> Checksums:
    return Checksums(sha256=hashlib.sha256(content).hexdigest())


def test_hundreds_of_files_arrive_with_their_checksums_and_versions(
    engine: Transferer, server: FileServer, tmp_path: Path
) -> None:
    contents = {f"f{number}": os.urandom(number * 97) for number in range(MANY)}
    for name, content in contents.items():
        server.put(name, content)
    directory = tmp_path / "here"
    directory.mkdir()
    found = fetch(engine, *[wanted(f"{server.url}/{name}", directory / name) for name in contents])
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == contents
    for name, content in contents.items():
        moved = found[name]
        assert moved is not None
        assert moved.size == len(content)
        assert moved.checksums.sha256 == hashlib.sha256(content).hexdigest()
        assert moved.checksums.md5 == hashlib.md5(content).hexdigest()


def test_several_jobs_use_lanes_at_the_same_time(
    engine: Transferer, server: FileServer, tmp_path: Path
) -> None:
    server.put("f", b"content")

    def job(number: int) -> int:
        directory = tmp_path / f"job{number}"
        directory.mkdir()
        wants = [wanted(f"{server.url}/f", directory / str(n)) for n in range(MANY)]
        return sum(moved is not None for moved in fetch(engine, *wants).values())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(job, range(4))) == [MANY] * 4


def test_files_come_by_tls_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: Transferer
) -> None:
    authority = Authority(tmp_path / "authority")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.certificate))
    connecting.tls_context.cache_clear()
    with serving(tmp_path / "https", certificate=authority.issue("files")) as server:
        contents = {f"f{number}": os.urandom(200_000) for number in range(40)}
        for name, content in contents.items():
            server.put(name, content)
        downloads = [wanted(f"{server.url}/{name}", tmp_path / name) for name in contents]
        assert all(fetch(engine, *downloads).values())
    connecting.tls_context.cache_clear()
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents


@pytest.mark.parametrize(
    ("faults", "more"),
    [
        ({"storm": 1 << 30}, {}),
        ({"signature": "other"}, {}),
        ({"reset_every": 1000}, {}),
        ({"chunked": True}, {}),
        ({}, {"size": 4}),
        ({}, {"expected": sha256(b"something else")}),
        ({"claimed": 200_000}, {}),
    ],
    ids=["503", "403", "reset", "no length", "other size", "other checksum", "wrong length"],
)
def test_what_does_not_go_well_comes_back_undone_and_leaves_nothing(
    engine: Transferer,
    tmp_path: Path,
    faults: dict[str, Any],
    more: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lane, "PATIENCE_SECONDS", 0.2)
    with unruly(data=os.urandom(100_000), **faults) as server:
        downloads = [wanted(server.url(), tmp_path / f"f{n}", **more) for n in range(3)]
        assert fetch(engine, *downloads) == {"f0": None, "f1": None, "f2": None}
    assert not list(tmp_path.iterdir())


def test_a_server_in_trouble_is_left_alone_after_a_few_failures(
    engine: Transferer, tmp_path: Path
) -> None:
    with unruly(data=b"x", storm=1 << 30) as server:
        found = fetch(engine, *[wanted(server.url(), tmp_path / f"f{n}") for n in range(MANY)])
        assert list(found.values()) == [None] * MANY
        assert len(server.requests) < lane.FAILURES + lane.CONNECTIONS


def test_after_a_lane_was_given_up_the_next_one_tries_nothing(
    engine: Transferer, server: FileServer, tmp_path: Path
) -> None:
    server.put("f", b"content")
    with unruly(data=b"x", storm=1 << 30) as troubled:
        fetch(engine, *[wanted(troubled.url(), tmp_path / f"f{n}") for n in range(MANY)])
    assert fetch(engine, wanted(f"{server.url}/f", tmp_path / "f")) == {"f": None}
    assert not server.seen


@pytest.mark.parametrize(
    "head",
    [
        "HTTP/1.1 20² OK\r\nContent-Length: 1",
        "HTTP/1.1 200 OK\r\nContent-Length: " + "9" * 5000,
        "HTTP/1.1 200 OK\r\nContent-Length: -1",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5",
        "nonsense",
    ],
)
def test_an_answer_that_is_not_http_is_no_defect_of_ours(
    engine: Transferer, tmp_path: Path, head: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=_answer_all, args=(listener, head))
        answering.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/f"
        assert fetch(engine, wanted(url, tmp_path / "f")) == {"f": None}
        ordinary = Transferer(attempts=1)
        with pytest.raises(Unreachable, match=r"not HTTP|broke off"):
            ordinary.download(Transfer(url=url), tmp_path / "f", name="f")
        ordinary.close()
        answering.join()


def _answer_all(listener: socket.socket, head: str) -> None:
    """Both requests."""
    for _ in range(2):
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(f"{head}\r\n\r\nx".encode("latin-1"))


def test_an_answer_in_chunks_is_left_to_the_ordinary_way_whatever_length_it_claims(
    engine: Transferer, tmp_path: Path
) -> None:
    head = (
        "HTTP/1.1 200 OK\r\nContent-Length: 15\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=_answer_all, args=(listener, head))
        answering.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/f"
        assert fetch(engine, wanted(url, tmp_path / "f")) == {"f": None}
        engine.download(Transfer(url=url), tmp_path / "f", name="f")
        answering.join()
    assert (tmp_path / "f").read_bytes() == b"hello"


def test_a_family_of_addresses_that_this_machine_does_not_know_is_passed_over(
    engine: Transferer, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("f", b"content")
    known = socket.getaddrinfo

    def two(*arguments: Any, **options: Any) -> Any:
        strange = (999, socket.SOCK_STREAM, 0, "", ("::1", 1, 0, 0))
        return [strange, *known(*arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    (moved,) = fetch(engine, wanted(f"{server.url}/f", tmp_path / "f")).values()
    assert moved is not None


def test_an_upload_by_tls_counts_what_it_has_sent(tmp_path: Path) -> None:
    """Of a file that does not fit into the buffers of a connection whose other side reads nothing yet."""
    authority = Authority(tmp_path / "authority")
    certificate = authority.issue("files")
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(certificate.certificate, certificate.key)
    client = ssl.create_default_context(cafile=str(authority.certificate))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain = socket.create_connection(listener.getsockname())
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        accepted = listener.accept()[0]
        with ThreadPoolExecutor(1) as pool:
            greeting = pool.submit(served.wrap_socket, accepted, server_side=True)
            secure = client.wrap_socket(plain, server_hostname="127.0.0.1")
            other = greeting.result()
    line = lane._Line(
        connecting.Place("https", "127.0.0.1", 443, ""), Wire(secure, Patience(), lambda: None)
    )
    line.begin(bytes(lane.SMALL_BYTES))
    assert not line.send()
    reading = threading.Thread(target=_read, args=(other, 300_000))
    reading.start()
    while len(line.out) == lane.SMALL_BYTES:
        select.select([], [secure], [])
        line.send()
    assert 0 < len(line.out) < lane.SMALL_BYTES
    while reading.is_alive():
        line.send()
    secure.close()
    other.close()
    reading.join()


def _read(connection: ssl.SSLSocket, count: int) -> None:
    while count > 0:
        count -= len(connection.recv(65536))


def test_giving_up_does_not_wait_for_a_connection(tmp_path: Path) -> None:
    """A server that takes the connection and never answers the TLS greeting, for which there would be an hour."""
    cancelled = threading.Event()
    patience = Patience(connect_seconds=3600)
    engine = Transferer(cancelled=cancelled, patience=patience)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/f"
        with ThreadPoolExecutor(2) as pool:
            by_lane = pool.submit(fetch, engine, wanted(url, tmp_path / "f"))
            one = pool.submit(engine.download, Transfer(url=url), tmp_path / "g", name="g")
            greeted = [listener.accept()[0] for _ in range(2)]
            cancelled.set()
            assert by_lane.result() == {"f": None}
            with pytest.raises(Unreachable, match="cancelled"):
                one.result()
        for connection in greeted:
            connection.close()
    engine.close()


def test_one_failure_stops_no_other(engine: Transferer, server: FileServer, tmp_path: Path) -> None:
    server.put("good", b"good")
    names = ["good", "missing", "good", "missing", "good"]
    found = fetch(
        engine, *[wanted(f"{server.url}/{name}", tmp_path / f"{n}") for n, name in enumerate(names)]
    )
    assert {name for name, moved in found.items() if moved is None} == {"1", "3"}


def test_nobody_there_and_no_url_come_back_undone(engine: Transferer, tmp_path: Path) -> None:
    assert fetch(
        engine,
        wanted("http://127.0.0.1:9/x", tmp_path / "a"),
        wanted("file:///etc/passwd", tmp_path / "b"),
    ) == {"a": None, "b": None}


def test_a_server_that_drips_is_given_up(
    engine: Transferer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "LONGEST_SECONDS", 0.1)
    with unruly(data=b"x" * 10, drip=True) as server:
        assert fetch(engine, wanted(server.url(), tmp_path / "f")) == {"f": None}


def test_after_a_cancellation_all_that_is_left_comes_back_undone(
    server: FileServer, tmp_path: Path
) -> None:
    server.put("f", b"content")
    cancelled = threading.Event()
    engine = Transferer(cancelled=cancelled)
    moves = engine.download_small(
        [wanted(f"{server.url}/f", tmp_path / f"{n}") for n in range(MANY)]
    )
    first = next(moves)
    cancelled.set()
    rest = list(moves)
    engine.close()
    assert first[1] is not None
    assert len(rest) == MANY - 1
    assert sum(moved is None for _, moved in rest) > MANY / 2


def test_a_lane_that_is_left_early_closes_what_it_has_open(
    engine: Transferer, server: FileServer, tmp_path: Path
) -> None:
    """Sockets that nobody closed are warnings, which are errors here."""
    server.put("f", b"content")
    moves = engine.download_small([wanted(f"{server.url}/f", tmp_path / f"{n}") for n in range(50)])
    assert next(moves)[1] is not None
    del moves
    engine.close()
    gc.collect()
    assert not list(tmp_path.glob("*.part"))


# -- uploads -----------------------------------------------------------------------------------------------------


def sending(server: Unruly, path: Path, **headers: str) -> SmallUpload:
    transfer = Transfer(url=server.url("/whole"), method="PUT", headers=headers)
    return SmallUpload(
        opens=lambda: path.open("rb"),
        grant=UploadGrant(upload_id="u", transfer=transfer),
        name=path.name,
    )


def test_files_are_sent_with_their_checksums(engine: Transferer, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(900_000))
    with unruly() as server:
        ((_, moved),) = engine.upload_small([sending(server, path)])
        assert server.stored == path.read_bytes()
    assert moved is not None
    assert moved.checksums.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_memory_does_not_grow_with_the_number_of_files(engine: Transferer, tmp_path: Path) -> None:
    """What a lane's connections hold (each a little more than one file), and next to nothing for each file."""
    path = tmp_path / "f"
    path.write_bytes(b"content")
    with unruly() as server:
        uploads = [sending(server, path) for _ in range(1000)]
        tracemalloc.start()
        try:
            sent = sum(moved is not None for _, moved in engine.upload_small(uploads))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert sent == 1000
    assert peak < 2 * lane.CONNECTIONS * (lane.SMALL_BYTES + lane.HEAD_BYTES)


def test_an_upload_that_is_refused_or_signed_for_another_size_comes_back(
    engine: Transferer, tmp_path: Path
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"content")
    with unruly(storm=1) as server:
        ((_, stormed),) = engine.upload_small([sending(server, path)])
        ((_, other),) = engine.upload_small([sending(server, path, **{"Content-Length": "3"})])
        assert server.stored is None
    assert stormed is None
    assert other is None


def test_a_file_that_has_grown_comes_back_and_leaves_no_thread(
    engine: Transferer, tmp_path: Path
) -> None:
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.truncate(40 * 1024 * 1024)
    with unruly() as server:
        before = threading.active_count()
        ((_, moved),) = engine.upload_small([sending(server, path)])
        assert threading.active_count() == before
    assert moved is None


def test_a_file_that_changes_while_it_is_sent_is_no_output(
    engine: Transferer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"content")
    read = Source.small

    def read_and_change(source: Source) -> bytes:
        content = read(source)
        path.write_bytes(b"other content")
        return content

    monkeypatch.setattr(Source, "small", read_and_change)
    with unruly() as server:
        ((_, moved),) = engine.upload_small([sending(server, path)])
    assert moved is None
