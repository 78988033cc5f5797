"""Stored files as HTTP answers: whole or a range of them, a piece at a time, from any kind of store."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import BinaryIO
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from valohai_dagster.errors import StoreError, StoreMissing
from valohai_dagster.stores.base import Store

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
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")  # no number that is dear to read


def file_answer(
    request: Request, store: Store, key: str, *, name: str, size: int, headers: Mapping[str, str]
) -> Response:
    """The file, or the part of it that the request asks for. `headers` hold its ETag.

    What users stored is not trusted: only harmless types are shown inline, everything runs sandboxed.
    """
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=dict(headers))
    wanted = _wanted(request, size, headers["ETag"])
    if wanted is None:
        return PlainTextResponse(
            f"{name} has {size} bytes\n", 416, {"Content-Range": f"bytes */{size}"}
        )
    start, end, partial = wanted
    media_type, disposition = _presentation(name)
    answer = {
        **_SAFE_HEADERS,
        **headers,
        "Content-Disposition": disposition,
        "Content-Length": str(end - start),
        "Accept-Ranges": "bytes",
        **({"Content-Range": f"bytes {start}-{end - 1}/{size}"} if partial else {}),
    }
    code = 206 if partial else 200
    if request.method == "HEAD":
        return Response(status_code=code, media_type=media_type, headers=answer)
    try:
        content = store.open(key, offset=start)
    except StoreMissing:
        return PlainTextResponse(f"{name} is no longer in store {store.name}\n", 410)
    except StoreError as error:
        return PlainTextResponse(f"{error}\n", 503)
    pieces = _pieces(content, end - start)
    return StreamingResponse(pieces, code, media_type=media_type, headers=answer)


def _wanted(request: Request, size: int, etag: str) -> tuple[int, int, bool] | None:
    """(start, end, whether it is a part); None when there is nothing of what is asked for.

    Several ranges, other units, positions that no file has, and a range of another version get the whole file, as RFC 9110 allows.
    """
    text = request.headers.get("range", "")
    condition = request.headers.get("if-range")
    match = _RANGE.fullmatch(text.replace(" ", ""))
    if match is None or (condition is not None and condition != etag):
        return 0, size, False
    first, last = match.groups()
    if not first and not last:
        return 0, size, False
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1 if last else size)
        if last and int(last) < start:
            return 0, size, False
    return (start, end, True) if start < size and start < end else None


def _pieces(content: BinaryIO, count: int) -> Iterator[bytes]:
    with content:
        while count > 0 and (piece := content.read(min(CHUNK_BYTES, count))):
            count -= len(piece)
            yield piece


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
