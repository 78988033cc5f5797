"""What every kind of store can do: sign, stat, list, put, get, delete; one file of this package per kind.

Keys are `/`-separated, relative, without empty, `.` or `..` parts; `check_key` refuses others. Nothing here ever
overwrites (O-02): `put` on an existing key raises `StoreConflict`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import BinaryIO, Literal, Protocol, runtime_checkable

from valohai_agent.protocol import Parts, Transfer


@dataclass(frozen=True, kw_only=True)
class ObjectStat:
    """One stored object; `version` changes when the content does (ETag, generation, or size and mtime)."""

    key: str
    size: int
    version: str
    mtime: datetime


@dataclass(frozen=True, kw_only=True)
class PartedUpload:
    """An upload in parts that a store has begun. `token` may be a credential: keep it encrypted, never show it."""

    style: Literal["s3", "azure", "swift", "session"]
    part_bytes: int
    token: str = field(repr=False)


@runtime_checkable
class Store(Protocol):
    """One configured place for files. Drivers raise the errors of `valohai_dagster.errors.StoreError`."""

    name: str
    kind: str
    readonly: bool

    def sign_get(self, key: str, *, expires: timedelta) -> Transfer:
        """A request that reads the object; never fails for a missing one (the reader gets a 404)."""
        ...

    def sign_put(self, key: str, *, expires: timedelta, size: int | None = None) -> Transfer:
        """A request that writes a fresh object once, smallest scope the store can express."""
        ...

    def begin_parts(self, key: str, *, size: int) -> PartedUpload | None:
        """Begins an upload of `size` bytes in parts; None when one PUT of `sign_put` is the better way."""
        ...

    def sign_parts(
        self, key: str, upload: PartedUpload, numbers: Sequence[int], *, expires: timedelta
    ) -> Parts:
        """Requests for these parts (from 1) and for the finish; may be asked again when they have run out."""
        ...

    def abort_parts(self, key: str, upload: PartedUpload) -> None:
        """Leaves nothing of an upload that was begun; silent when it was finished, aborted or never known."""
        ...

    def stat(self, key: str) -> ObjectStat | None:
        """None when there is no such object; raises when the store cannot tell."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        """Objects whose key starts with prefix, in key order."""
        ...

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        """The content from `offset` on, for the control plane itself (logs, pictures, downloads).

        The stream need not be seekable. Raises `StoreMissing`; an offset at or behind the end gives nothing.
        """
        ...

    def put(self, key: str, content: BinaryIO | bytes) -> ObjectStat: ...

    def delete(self, key: str) -> None:
        """Silent when the object does not exist."""
        ...

    def wipe(self, key: str) -> None:
        """`delete`, and nothing stays of uploads of this key that were begun, also of those that nobody remembers.

        Uploads that go on are cut off. What a store forgets by itself in time may stay until then.
        """
        ...

    def uri(self, key: str) -> str:
        """How people name the object, such as s3://bucket/key."""
        ...

    def key_of(self, uri: str) -> str | None:
        """The key (may hold wildcards) when this store serves the URI (I-02), else None."""
        ...


@runtime_checkable
class JoiningStore(Store, Protocol):
    """A store whose parts the control plane joins, since no signed request can: `Parts.finish` is None there."""

    def join_parts(self, key: str, upload: PartedUpload, *, size: int) -> ObjectStat:
        """Makes the object of its parts, which must add up to `size` bytes; nothing is visible before.

        To be called once the uploader says that all parts are stored, and before anybody hears of the object.
        Repeating it is safe. Raises `StoreMissing` when parts are missing or of another size.
        """
        ...
