"""Signs what a wish needs of one store. Blocks as long as the store does; called on a thread of that store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

from valohai_agent.protocol import GRANTED_PARTS, Parts, Transfer, UploadGrant
from valohai_dagster.errors import StoreError, StoreUnavailable
from valohai_dagster.executions.wishes import Get, MoreParts, Put, Wish
from valohai_dagster.stores.base import JoiningStore, PartedUpload, Store

T = TypeVar("T")


@dataclass(kw_only=True)
class Signed:
    """By name of the file or id of the request; `begun` by upload id."""

    transfers: dict[str, Transfer] = field(default_factory=dict, repr=False)
    uploads: dict[str, UploadGrant] = field(default_factory=dict, repr=False)
    begun: dict[str, PartedUpload] = field(default_factory=dict, repr=False)
    refused: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)  # may work a little later

    def add(self, other: Signed) -> None:
        """Takes over what became of some names, but not what may still work."""
        self.transfers.update(other.transfers)
        self.uploads.update(other.uploads)
        self.begun.update(other.begun)
        self.refused.update(other.refused)


def sign(
    wish: Wish,
    store: Callable[[], Store],
    *,
    life: timedelta,
    now: datetime,
    begun: Mapping[str, PartedUpload],
) -> Signed:
    """All of the wish is of one store; `begun`: uploads in parts that an earlier try has begun."""
    signing = _Signing(store, life, now, begun)
    for get in wish.gets:
        signing.attempt(get.name, lambda s, get=get: signing.get(s, get), _as_transfer)
    for put in wish.puts:
        signing.attempt(put.request_id, lambda s, put=put: signing.put(s, put), _as_upload)
    for more in wish.more:
        signing.attempt(more.request_id, lambda s, more=more: signing.more(s, more), _as_upload)
    return signing.signed


class _Signing:
    def __init__(
        self,
        store: Callable[[], Store],
        life: timedelta,
        now: datetime,
        begun: Mapping[str, PartedUpload],
    ) -> None:
        self.signed = Signed(begun=dict(begun))
        self._store, self._life, self._end = store, life, now + life
        self._away: str | None = (
            None  # why the store cannot be reached; asked once, not for every file
        )

    def attempt(
        self, name: str, call: Callable[[Store], T], keep: Callable[[Signed, str, T], None]
    ) -> None:
        if self._away is not None:
            self.signed.unavailable[name] = self._away
            return
        try:
            keep(self.signed, name, call(self._store()))
        except StoreUnavailable as error:
            self._away = self.signed.unavailable[name] = str(error)
        except StoreError as error:
            self.signed.refused[name] = str(error)

    def ending(self, transfer: Transfer) -> Transfer:
        """States the end of a URL that has one, for the worker to know when to ask again."""
        if transfer.expires_at is not None or transfer.url.startswith("file:"):
            return transfer
        return transfer.model_copy(update={"expires_at": self._end})

    def get(self, store: Store, get: Get) -> Transfer:
        return self.ending(store.sign_get(get.key, expires=self._life))

    def put(self, store: Store, put: Put) -> UploadGrant:
        upload = self.signed.begun.get(put.upload_id)
        if upload is None and put.size is not None:
            upload = store.begin_parts(put.key, size=put.size)
        if upload is None:
            transfer = store.sign_put(put.key, expires=self._life, size=put.size)
            return UploadGrant(upload_id=put.upload_id, transfer=self.ending(transfer))
        self.signed.begun[put.upload_id] = upload
        last = 1 if upload.style == "session" else -(-(put.size or 1) // upload.part_bytes)
        numbers = range(1, min(last, GRANTED_PARTS) + 1)
        parts = self._parts(store, put.key, upload, numbers)
        # For an agent that knows no parts; a store that cannot take that much at once says so itself.
        transfer = store.sign_put(put.key, expires=self._life, size=put.size)
        return UploadGrant(upload_id=put.upload_id, transfer=self.ending(transfer), parts=parts)

    def more(self, store: Store, more: MoreParts) -> UploadGrant:
        if not more.numbers and isinstance(store, JoiningStore):
            store.join_parts(more.key, more.upload, size=more.size)
        parts = self._parts(store, more.key, more.upload, more.numbers)
        transfer = store.sign_put(more.key, expires=self._life, size=more.size)
        return UploadGrant(upload_id=more.upload_id, transfer=self.ending(transfer), parts=parts)

    def _parts(self, store: Store, key: str, upload: PartedUpload, numbers: range) -> Parts:
        signed = store.sign_parts(key, upload, numbers, expires=self._life)
        finish = None if signed.finish is None else self.ending(signed.finish)
        parts = {number: self.ending(transfer) for number, transfer in signed.parts.items()}
        return signed.model_copy(update={"parts": parts, "finish": finish})


def _as_transfer(signed: Signed, name: str, transfer: Transfer) -> None:
    signed.transfers[name] = transfer


def _as_upload(signed: Signed, name: str, grant: UploadGrant) -> None:
    signed.uploads[name] = grant
