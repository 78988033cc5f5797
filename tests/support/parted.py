"""Uploads in parts by a plain HTTP client, as a worker does them: one function per way that stores have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

import httpx

from valohai_agent.protocol import Parts, Transfer, block_id
from valohai_dagster.stores.base import JoiningStore, PartedUpload, Store

HOUR = timedelta(hours=1)


def begun(store: Store, key: str, *, size: int) -> PartedUpload:
    upload = store.begin_parts(key, size=size)
    assert upload is not None
    return upload


def numbers_of(upload: PartedUpload, content: bytes) -> Sequence[int]:
    return range(1, -(-len(content) // upload.part_bytes) + 1)


def in_order(upload: PartedUpload) -> bool:
    """A session takes its chunks one after the other only."""
    return upload.style == "session"


def send_parts(
    store: Store, key: str, upload: PartedUpload, content: bytes, numbers: Iterable[int]
) -> dict[int, str]:
    """Sends these parts, each signed on its own; their ETags."""
    tags: dict[int, str] = {}
    for number in numbers:
        parts = store.sign_parts(key, upload, [number], expires=HOUR)
        start = (number - 1) * upload.part_bytes
        piece = content[start : start + upload.part_bytes]
        if upload.style == "session":
            answer = _chunk(parts.parts[1], piece, start, len(content))
        else:
            answer = send(parts.parts[number], piece)
        tags[number] = answer.headers.get("ETag", "")
    return tags


def finish(
    store: Store, key: str, upload: PartedUpload, tags: dict[int, str], *, size: int
) -> httpx.Response | None:
    """What a worker does after the last part, and the control plane where only that can; None: nothing was left."""
    parts = store.sign_parts(key, upload, [], expires=HOUR)
    if upload.style == "session":
        return None
    if isinstance(store, JoiningStore):
        assert parts.finish is None
        store.join_parts(key, upload, size=size)
        return None
    assert parts.finish is not None
    return request(parts.finish, finishing(parts, tags))


def finishing(parts: Parts, tags: dict[int, str]) -> bytes:
    """The body of the finish."""
    if parts.style == "azure":
        blocks = "".join(f"<Latest>{block_id(number)}</Latest>" for number in sorted(tags))
        return f"<BlockList>{blocks}</BlockList>".encode()
    listed = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{tags[number]}</ETag></Part>"
        for number in sorted(tags)
    )
    return f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()


def send(transfer: Transfer, content: bytes) -> httpx.Response:
    answer = request(transfer, content)
    answer.raise_for_status()
    return answer


def request(
    transfer: Transfer, content: bytes | None = None, *, headers: Mapping[str, str] | None = None
) -> httpx.Response:
    """The signed request just as it stands, with further headers that are not part of it."""
    return httpx.request(
        transfer.method,
        transfer.url,
        headers={**transfer.headers, **(headers or {})},
        content=content,
        timeout=60,
        trust_env=False,
    )


def _chunk(transfer: Transfer, piece: bytes, start: int, size: int) -> httpx.Response:
    span = f"bytes {start}-{start + len(piece) - 1}/{size}"
    answer = request(transfer, piece, headers={"Content-Range": span})
    assert answer.status_code in (200, 201, 308), answer.text
    return answer
