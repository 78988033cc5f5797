"""What happens to a content that the control plane reads while connections break, whatever kind of store it lies in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from valohai_dagster.errors import StoreUnavailable
from valohai_dagster.settings_stores import HttpStoreSettings
from valohai_dagster.stores.http import HttpStore
from valohai_dagster.stores.remote import READ_TRIES

CONTENT = bytes(range(256)) * 16_000


@dataclass(kw_only=True)
class Fragile:
    """Breaks each connection after `breaks_after` bytes, `times` times."""

    breaks_after: int = 1_500_000
    times: int
    knows_ranges: bool = True
    etags: list[str] = field(default_factory=lambda: ["one"])
    begun: list[int] = field(default_factory=list)  # where each answer began


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, fragile: Fragile, *arguments: object) -> None:
        self._fragile = fragile
        super().__init__(*arguments)  # pyright: ignore[reportArgumentType]

    def do_GET(self) -> None:
        fragile = self._fragile
        asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=")
        start = int(asked.partition("-")[0]) if fragile.knows_ranges else 0
        fragile.begun.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.send_header("ETag", fragile.etags[min(len(fragile.begun), len(fragile.etags)) - 1])
        self.end_headers()
        whole = len(fragile.begun) > fragile.times
        self.wfile.write(CONTENT[start:] if whole else CONTENT[start:][: fragile.breaks_after])

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def served(fragile: Fragile) -> Iterator[HttpStore]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, fragile))
    thread = threading.Thread(target=partial(server.serve_forever, 0.05))
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        yield HttpStore("main", HttpStoreSettings(kind="http", base_url=url))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("offset", [0, 1_000_001])
def test_a_broken_connection_is_taken_up_where_it_broke(offset: int) -> None:
    fragile = Fragile(times=2)
    with served(fragile) as store, store.open("a", offset=offset) as content:
        assert content.read() == CONTENT[offset:]
    assert len(fragile.begun) == 3
    assert sorted(set(fragile.begun)) == fragile.begun


def test_a_server_without_ranges_begins_at_the_front() -> None:
    with (
        served(Fragile(times=0, knows_ranges=False)) as store,
        store.open("a", offset=2_500_000) as content,
    ):
        assert content.read() == CONTENT[2_500_000:]


def test_a_server_that_always_breaks_is_given_up() -> None:
    fragile = Fragile(times=1000, breaks_after=0)
    refused = pytest.raises(StoreUnavailable, match=r"cannot read 'a'.*no answer")
    with served(fragile) as store, store.open("a") as content, refused:
        content.read()
    assert len(fragile.begun) == READ_TRIES


def test_a_content_that_is_replaced_meanwhile_is_not_mixed() -> None:
    fragile = Fragile(times=1, etags=["one", "two"])
    refused = pytest.raises(StoreUnavailable, match="was replaced while it was read")
    with served(fragile) as store, store.open("a") as content, refused:
        content.read()
