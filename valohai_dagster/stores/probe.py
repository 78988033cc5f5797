"""Whether a configured store does what it is configured for: looked at from here, by the ways that workers use too."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from typing import Literal

import httpx

from valohai_agent.protocol import Transfer
from valohai_dagster.errors import StoreError, ValohaiError
from valohai_dagster.stores.base import Store

CONTENT = b"probe"
DIRECTORY = "doctor"  # of the objects that probes write and delete
EXPIRY = timedelta(minutes=10)
SECONDS = 30.0
What = Literal["write", "read", "signed read", "delete", "look"]


@dataclass(frozen=True, kw_only=True)
class Probed:
    """One thing that was tried; `problem` says what was wrong and what to do, None that it worked."""

    what: What
    problem: str | None = None


def probe(store: Store) -> Iterator[Probed]:
    """A small object is written, read and deleted where the store may be written to; else it is only looked at."""
    if store.readonly:
        yield _tried("look", lambda: store.stat(f"{DIRECTORY}/{uuid.uuid4()}"))
        return
    key = f"{DIRECTORY}/{uuid.uuid4()}"
    written = _tried("write", lambda: _write(store, key))
    yield written
    if written.problem is not None:
        return
    yield _tried("read", lambda: _read(store, key))
    if store.sign_get(key, expires=EXPIRY).url.startswith("http"):
        yield _tried("signed read", lambda: _fetch(store, key))
    yield _tried("delete", lambda: store.delete(key))


def _tried(what: What, call: Callable[[], object]) -> Probed:
    try:
        call()
    except ValohaiError as error:  # also missing libraries and credentials, which show at first use
        return Probed(what=what, problem=str(error))
    return Probed(what=what)


def _write(store: Store, key: str) -> None:
    """As a worker does it, by a signed request, where the store has such."""
    transfer = store.sign_put(key, expires=EXPIRY, size=len(CONTENT))
    if transfer.url.startswith("http"):
        _send(store, transfer, "a signed request to write", CONTENT)
    else:
        store.put(key, CONTENT)


def _read(store: Store, key: str) -> None:
    with store.open(key) as content:
        _compare(store, content.read())


def _fetch(store: Store, key: str) -> None:
    transfer = store.sign_get(key, expires=EXPIRY)
    _compare(store, _send(store, transfer, "a signed request to read"))


def _send(store: Store, transfer: Transfer, what: str, content: bytes | None = None) -> bytes:
    try:
        answer = httpx.request(
            transfer.method,
            transfer.url,
            headers=transfer.headers,
            content=content,
            timeout=SECONDS,
        )
    except httpx.HTTPError as error:
        raise StoreError(
            f"the store {store.name!r} ({store.uri('')}) does not answer {what} ({type(error).__name__}); workers "
            f"must reach its address: check [stores.{store.name}] and the network",
            store=store.name,
        ) from None  # its text may hold the URL
    if not answer.is_success:
        if answer.status_code == HTTPStatus.NOT_FOUND:
            next(iter(store.list()), None)  # raises with the store's own words for a missing bucket
            advice = f"check the bucket or container and the address in [stores.{store.name}]"
        else:
            advice = f"check the credentials in [stores.{store.name}], what they may do, and the clock of this machine"
        raise StoreError(
            f"the store {store.name!r} ({store.uri('')}) refuses {what}: HTTP {answer.status_code}; {advice}",
            store=store.name,
        )
    return answer.content


def _compare(store: Store, content: bytes) -> None:
    if content != CONTENT:
        raise StoreError(
            f"the store {store.name!r} ({store.uri('')}) gives back other content than was written; is something "
            "between here and it that changes answers?",
            store=store.name,
        )
