"""The conductor's small HTTP server: files and logs at addresses that never expire.

`/datum/<id>` opens an output, `/log/<execution>/<attempt>/<stream>` a stored log, `/metrics` is for Prometheus. Read-only
and without state.
What users stored is not trusted: only harmless types are shown inline, everything runs sandboxed, and a server on a
loopback address answers only to loopback names, so no web page can read it through a rebound name.
"""

from __future__ import annotations

import ipaddress
import mimetypes
from collections.abc import Awaitable, Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote

import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from valohai_dagster.errors import StoreError, StoreMissing
from valohai_dagster.observability.prometheus import CONTENT_TYPE, EXTRA
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records
from valohai_dagster.stores.registry import Stores
from valohai_dagster.version import __version__

CHUNK_BYTES = 1024 * 1024
_INLINE = {
    "image/png",
    "image/jpeg",
    "image/gif",
    "image/webp",
    "application/pdf",
    "application/json",
}
_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:",
    "Cross-Origin-Resource-Policy": "cross-origin",  # pictures are shown inside the Dagster UI
    "Referrer-Policy": "no-referrer",
}


RenderMetrics = Callable[[], Awaitable[bytes | None]]


def make_app(
    records: Records, stores: Stores, *, host: str, metrics: RenderMetrics | None = None
) -> Starlette:
    """`host` is the address that the server listens on; `metrics` gives the page, None without the extra."""
    files = _Files(records, stores)
    routes = [
        Route("/health", _health),
        Route("/metrics", _metrics(metrics)),
        Route("/datum/{datum_id}", files.datum),
        Route("/datum/{datum_id}/{name:path}", files.datum),
        Route("/log/{execution_id}/{attempt:int}/{stream}", files.log),
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


class _Files:
    """Plain functions in Starlette's thread pool: they read the database and the stores."""

    def __init__(self, records: Records, stores: Stores) -> None:
        self._records = records
        self._stores = stores

    def datum(self, request: Request) -> Response:
        datum_id = request.path_params["datum_id"]
        with self._records.read() as conn:
            row = conn.execute(sa.select(t.datums).where(t.datums.c.id == datum_id)).one_or_none()
        if row is None:
            return PlainTextResponse(f"there is no datum {datum_id}\n", 404)
        if row.purged:
            return PlainTextResponse(
                f"the content of {row.name} was purged; its record is kept\n", 410
            )
        headers = {
            "Cache-Control": "private, max-age=31536000, immutable",
            "ETag": f'"{row.sha256}"',
        }
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return self._stream(row.store, row.key, row.name, row.size, headers)

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
        suffix = ".jsonl.gz" if params["stream"] == "events" else ".txt"
        return self._stream(
            stored["store"], stored["key"], params["stream"] + suffix, stored["size"], {}
        )

    def _stream(
        self, store: str, key: str, name: str, size: int, headers: dict[str, str]
    ) -> Response:
        try:
            content = self._stores[store].open(key)
        except StoreMissing:
            return PlainTextResponse(f"{name} is no longer in store {store}\n", 410)
        except StoreError as error:
            return PlainTextResponse(f"{error}\n", 503)
        media_type, disposition = _presentation(name)
        return StreamingResponse(
            _chunks(content),
            media_type=media_type,
            headers={
                **_SAFE_HEADERS,
                **headers,
                "Content-Disposition": disposition,
                "Content-Length": str(size),
            },
        )


def _presentation(name: str) -> tuple[str, str]:
    """Media type and disposition of a stored file; text of any kind is shown as plain text."""
    base = PurePosixPath(name).name
    guessed = mimetypes.guess_type(base)[0] or "application/octet-stream"
    if guessed in ("text/html", "image/svg+xml"):
        guessed = "application/octet-stream"
    elif guessed.startswith("text/"):
        guessed = "text/plain; charset=utf-8"
    inline = guessed in _INLINE or guessed.startswith("text/plain")
    kind = "inline" if inline else "attachment"
    return guessed, f"{kind}; filename*=UTF-8''{quote(base, safe='')}"


def _chunks(content: BinaryIO) -> Iterator[bytes]:
    with content:
        while chunk := content.read(CHUNK_BYTES):
            yield chunk
