"""The service's files, logs and traces over HTTP, from a local store and from one that is remote."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from starlette.applications import Starlette

from tests.support.servers.s3_stores import s3_store
from valohai_agent.protocol import utcnow
from valohai_dagster.data.datums import Datum, create_datum
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.registry import Stores, open_stores
from valohai_dagster.web.service_app import make_app

TEXT = b"".join(b"line %d\n" % n for n in range(200_000))


@dataclass(frozen=True, kw_only=True)
class Site:
    records: Records
    store: Store
    app: Starlette

    def get(self, path: str, *, method: str = "GET", **headers: str) -> httpx.Response:
        """Asks the application itself; names of headers with _ for -."""

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1"
            ) as client:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.request(method, path, headers=named)

        return asyncio.run(ask())

    def datum(self, name: str, content: bytes, **values: Any) -> str:
        ident = str(uuid.uuid4())
        self.store.put(f"data/{ident}/{name}", content)
        datum = Datum(
            id=ident,
            name=name,
            size=len(content),
            store=self.store.name,
            key=f"data/{ident}/{name}",
            ctime=utcnow(),
            sha256="a" * 64,
            **values,
        )
        with self.records.write() as connection:
            create_datum(connection, datum)
        return ident


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.stores)])
def site(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Site]:
    if request.param == "local":
        stores = open_stores(settings)
    else:
        remote = s3_store(request.getfixturevalue("moto_server"))
        stores = Stores({remote.name: remote}, default=remote.name)
    records = open_records(settings)
    app = make_app(
        records, stores, host="127.0.0.1", webserver_url=lambda: "http://dagster.example"
    )
    yield Site(records=records, store=stores.default, app=app)
    records.close()


def test_a_file_whole_and_in_ranges(site: Site) -> None:
    url = f"/datum/{site.datum('table.csv', TEXT)}"
    whole = site.get(url)
    assert whole.content == TEXT
    assert whole.headers["accept-ranges"] == "bytes"
    assert f"<{url}/trace>" in whole.headers["link"]
    size = len(TEXT)
    for wanted, start, end in (
        ("bytes=0-9", 0, 10),
        (f"bytes={size - 7}-", size - 7, size),
        ("bytes=-5", size - 5, size),
        (f"bytes=1000000-{size + 99}", 1_000_000, size),
    ):
        part = site.get(url, Range=wanted)
        assert (part.status_code, part.content) == (206, TEXT[start:end])
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    beyond = site.get(url, Range=f"bytes={size}-")
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    digits = "9" * 5000
    for ignored in (
        "bytes=0-1,3-4",
        "lines=0-1",
        "bytes=9-2",
        f"bytes={digits}-",
        f"bytes=0-{digits}",
        f"bytes=-{digits}",
    ):
        assert site.get(url, Range=ignored).status_code == 200


def test_conditions_and_heads(site: Site) -> None:
    url = f"/datum/{site.datum('table.csv', TEXT)}"
    head = site.get(url, method="HEAD")
    assert (head.headers["content-length"], head.content) == (str(len(TEXT)), b"")
    etag = head.headers["etag"]
    assert site.get(url, If_None_Match=etag).status_code == 304
    same = site.get(url, Range="bytes=0-1", If_Range=etag)
    other = site.get(url, Range="bytes=0-1", If_Range='"other"')
    assert (same.status_code, other.status_code) == (206, 200)


def test_logs_have_ranges_and_say_when_retention_took_them(site: Site) -> None:
    site.store.put("logs/1", TEXT)
    entry = {"store": site.store.name, "key": "logs/1", "size": len(TEXT), "lines": 1}
    gone = {"size": 5, "lines": 1, "removed_at": "2026-02-03T04:05:06+00:00"}
    execution(site.records, "e1", logs={"stdout": entry, "stderr": gone})
    part = site.get("/log/e1/1/stdout", Range="bytes=-10")
    assert (part.status_code, part.content) == (206, TEXT[-10:])
    removed = site.get("/log/e1/1/stderr")
    assert removed.status_code == 410
    assert "removed by retention on 2026-02-03" in removed.text
    assert site.get("/log/e1/1/events").status_code == 404


def test_o20_a_purged_file_says_so_and_keeps_its_trace(site: Site) -> None:
    ident = site.datum("w.bin", b"x")
    with site.records.write() as connection:
        mine = t.datums.c.id == ident
        values = {"purged": True, "purged_at": utcnow()}
        connection.execute(t.datums.update().where(mine).values(**values))
    answer = site.get(f"/datum/{ident}")
    assert answer.status_code == 410
    assert "was purged on" in answer.text
    assert "purged" in site.get(f"/datum/{ident}/trace").text


def test_a52_the_trace_page_escapes_what_users_named(site: Site) -> None:
    execution(site.records, "e1")
    evil = "<script>alert(1)</script>&\"'.csv"
    ident = site.datum("out.bin", b"x", execution_id="e1")
    with site.records.write() as connection:
        mine = t.datums.c.id == ident
        connection.execute(t.datums.update().where(mine).values(name=evil))
    page = site.get(f"/datum/{ident}/trace")
    assert page.status_code == 200
    assert "<script" not in page.text
    assert "&lt;script&gt;" in page.text
    assert "script-src" not in page.headers["content-security-policy"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://dagster.example/runs/run-1" in page.text
    assert "train #1" in site.get("/execution/e1/trace").text
    assert site.get("/datum/nobody/trace").status_code == 404


def test_a52_many_alike_are_one_box_and_each_can_be_drawn(site: Site) -> None:
    execution(site.records, "e1")
    for n in range(9):
        site.datum(f"o{n}.txt", b"x", execution_id="e1")
    folded, every = (site.get(f"/execution/e1/trace{query}").text for query in ("", "?all=1"))
    assert "9 files" in folded
    assert '<a href="?all=1">' in folded
    assert "9 files" not in every
    assert all(f">o{n}.txt<" in every for n in range(9))


def execution(records: Records, ident: str, *, logs: dict[str, Any] | None = None) -> None:
    """A finished execution with one attempt."""
    with records.write() as connection:
        connection.execute(
            t.projects.insert().values(id="p", name="digits", counter=1, ctime=utcnow())
        )
        values = {"id": ident, "project_id": "p", "counter": 1, "step": "train", "commit": "c0ffee"}
        more = {"group_name": "local", "image": "i", "spec": {}, "status": "complete"}
        times = {"ctime": utcnow(), "ended_at": utcnow(), "run_id": "run-1"}
        connection.execute(t.executions.insert().values(**values, **more, **times))
        attempt = {"execution_id": ident, "number": 1, "logs": logs or {}}
        connection.execute(t.attempts.insert().values(**attempt))


def test_a_store_that_is_gone_from_the_settings_is_named(site: Site) -> None:
    ident = site.datum("w.bin", b"x")
    with site.records.write() as connection:
        connection.execute(sa.update(t.datums).values(store="nowhere"))
    answer = site.get(f"/datum/{ident}")
    assert (answer.status_code, "nowhere" in answer.text) == (503, True)


def test_i40_a_replaced_object_is_not_sent_for_the_adopted_one(site: Site) -> None:
    now = site.datum("a.txt", b"hello", adopted=True)
    found = site.store.stat(f"data/{now}/a.txt")
    assert found is not None
    for version, status in ((found.version, 200), ("9a3f", 409)):
        with site.records.write() as conn:
            conn.execute(t.datums.update().where(t.datums.c.id == now).values(version=version))
        answer = site.get(f"/datum/{now}")
        assert answer.status_code == status
    assert "was 9a3f; adopt it again" in answer.text
