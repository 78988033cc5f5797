"""The conductor's small HTTP server: files and logs at addresses that never expire.

`/datum/<id>` opens an output, `/log/<execution>/<attempt>/<stream>` a stored log, `/datum/<id>/trace` and
`/execution/<id>/trace` draw where things come from, `/metrics` is for Prometheus. Read-only and without state;
worker machines join elsewhere (`joining.py`).
A server on a loopback address answers only to loopback names, so no web page can read it through a rebound name.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from valohai_dagster.data import datums
from valohai_dagster.data.trace import trace
from valohai_dagster.data.trace_folding import cut, fold
from valohai_dagster.errors import StoreError
from valohai_dagster.observability.prometheus import CONTENT_TYPE, EXTRA
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.registry import Stores
from valohai_dagster.version import __version__
from valohai_dagster.web.file_answers import file_answer
from valohai_dagster.web.trace_page import HEADERS, trace_page

RenderMetrics = Callable[[], Awaitable[bytes | None]]
MOST_DRAWN = 5000  # boxes of a trace with every file


def make_app(
    records: Records,
    stores: Stores,
    *,
    host: str,
    metrics: RenderMetrics | None = None,
    webserver_url: Callable[[], str] = str,
    further: Sequence[BaseRoute] = (),
) -> Starlette:
    """`host` is the address that the server listens on; `metrics` gives the page, None without the extra.

    `webserver_url` gives the address of Dagster's webserver, for links to runs; an empty one means no links.
    `further` are routes of other parts of the service.
    """
    files = _Files(records, stores, webserver_url)
    routes = [
        Route("/health", _health),
        Route("/metrics", _metrics(metrics)),
        Route("/datum/{datum_id}", files.datum),
        Route("/datum/{datum_id}/trace", files.datum_trace),
        Route("/execution/{execution_id}/trace", files.execution_trace),
        Route("/datum/{datum_id}/{name:path}", files.datum),
        Route("/log/{execution_id}/{attempt:int}/{stream}", files.log),
        *further,
    ]
    app = Starlette(routes=routes)
    if _is_loopback(host):
        app.add_middleware(_LoopbackNamesOnly)
    return app


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok", "version": __version__})


def _metrics(render: RenderMetrics | None) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        page = await render() if render is not None else None
        if page is None:
            return PlainTextResponse(f"metrics need {EXTRA}\n", 501)
        return Response(page, media_type=CONTENT_TYPE)

    return answer


class _LoopbackNamesOnly(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        if not _is_loopback(request.url.hostname or ""):
            return PlainTextResponse("this server answers to loopback names only\n", 421)
        return await call_next(request)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _replaced(row: Any, store: Store) -> Response | None:
    """The refusal of an adopted object whose store calls it otherwise now."""
    try:
        found = store.stat(row.key)
    except StoreError as error:
        return PlainTextResponse(f"{error}\n", 503)
    if found is None or found.version[: datums.VERSION_CHARS] == row.version:
        return None
    text = f"{row.name} was replaced in its store since it was adopted: its version is {found.version}, was {row.version}"
    return PlainTextResponse(f"{text}; adopt it again for what is there now\n", 409)


class _Files:
    """Plain functions in Starlette's thread pool: they read the database and the stores."""

    def __init__(self, records: Records, stores: Stores, webserver_url: Callable[[], str]) -> None:
        self._records = records
        self._stores = stores
        self._webserver_url = webserver_url

    def datum(self, request: Request) -> Response:
        datum_id = request.path_params["datum_id"]
        with self._records.read() as conn:
            row = conn.execute(sa.select(t.datums).where(t.datums.c.id == datum_id)).one_or_none()
        if row is None:
            return PlainTextResponse(f"there is no datum {datum_id}\n", 404)
        trace = {"Link": f'<{request.url.path.rstrip("/")}/trace>; rel="describedby"'}
        if row.purged:
            when = f" on {row.purged_at:%Y-%m-%d}" if row.purged_at else ""
            text = f"the content of {row.name} was purged{when}; its record is kept\n"
            return PlainTextResponse(text, 410, trace)
        headers = {
            **trace,
            "Cache-Control": "private, max-age=31536000, immutable",
            "ETag": f'"{row.sha256 or row.id}"',
        }
        store = self._store(row.store)
        if isinstance(store, Response):
            return store
        refusal = _replaced(row, store) if row.version else None
        return refusal or file_answer(
            request, store, row.key, name=row.name, size=row.size, headers=headers
        )

    def log(self, request: Request) -> Response:
        params = request.path_params
        c = t.attempts.c
        mine = sa.and_(c.execution_id == params["execution_id"], c.number == params["attempt"])
        with self._records.read() as conn:
            logs: dict[str, Any] | None = conn.execute(
                sa.select(c.logs).where(mine)
            ).scalar_one_or_none()
        stored = (logs or {}).get(params["stream"])
        if stored is None:
            return PlainTextResponse("no such log, or its attempt still runs\n", 404)
        if not stored.get("key"):
            when = str(stored.get("removed_at", ""))[:10]
            return PlainTextResponse(f"this log was removed by retention on {when}\n", 410)
        name = params["stream"] + (".jsonl.gz" if params["stream"] == "events" else ".txt")
        etag = hashlib.sha256(f"{stored['store']}/{stored['key']}".encode()).hexdigest()[:32]
        headers = {"Cache-Control": "private, no-cache", "ETag": f'"{etag}"'}
        store = self._store(stored["store"])
        if isinstance(store, Response):
            return store
        return file_answer(
            request, store, stored["key"], name=name, size=stored["size"], headers=headers
        )

    def _store(self, name: str) -> Store | Response:
        try:
            return self._stores[name]
        except StoreError as error:
            return PlainTextResponse(f"{error}\n", 503)

    def datum_trace(self, request: Request) -> Response:
        return self._trace(request, f"file:{request.path_params['datum_id'].lower()}")

    def execution_trace(self, request: Request) -> Response:
        return self._trace(request, f"execution:{request.path_params['execution_id'].lower()}")

    def _trace(self, request: Request, root: str) -> Response:
        """`?all=1` draws every file, as far as a browser bears it."""
        with self._records.read() as conn:
            found = trace(conn, [root])
        if root not in found.nodes:
            return PlainTextResponse(f"the records have no {root.replace(':', ' ')}\n", 404)
        every = request.query_params.get("all") == "1"
        found = cut(found, MOST_DRAWN) if every else cut(fold(found))
        page = trace_page(found, webserver_url=self._webserver_url())
        return HTMLResponse(page, headers=HEADERS)
