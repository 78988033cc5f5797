"""What one lease is to be granted: read from the records, not signed yet.

Between the records (which note every fresh key first) and the stores (which may be slow): a `Wish` is made inside the
transaction that applies the agent's report and is granted outside of it, see `minting`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace

from valohai_agent.protocol import Transfer
from valohai_dagster.stores.base import PartedUpload

MANY_PUTS = (
    16  # that two threads share: beginning an upload in parts is a call of the store's server
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Get:
    """An object to be read; `name` is the file's id in the job, or `archive`."""

    name: str
    store: str
    key: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Put:
    """A fresh key to be written; the records know it already."""

    request_id: str
    upload_id: str
    store: str
    key: str
    size: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MoreParts:
    """Further or fresh parts of an upload in parts, and a fresh finish. No part: all are stored and may be joined."""

    request_id: str
    upload_id: str
    store: str
    key: str
    upload: PartedUpload
    size: int
    numbers: range


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """All that is to be answered with one entry of the grant stream."""

    execution_id: str
    group: str
    shard: int
    token: str = field(repr=False)
    public_key: str
    initial: bool = False
    image: str | None = None  # wants the credentials of its registry
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    urls: Mapping[str, Transfer] = field(default_factory=dict, repr=False)  # by file id
    gets: tuple[Get, ...] = ()
    puts: tuple[Put, ...] = ()
    more: tuple[MoreParts, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def asked(self) -> frozenset[tuple[str, str]]:
        """What it answers, by lease: the same is not minted twice at a time."""
        names = {*self.urls, *self.refused, *(get.name for get in self.gets)}
        names |= {put.request_id for put in self.puts} | {more.request_id for more in self.more}
        return frozenset((self.token, name) for name in (names if not self.initial else {"*"}))

    @property
    def stores(self) -> list[str]:
        """Of all that has to be signed, each once."""
        return list(dict.fromkeys(item.store for item in (*self.gets, *self.puts, *self.more)))

    def of_store(self, store: str) -> Wish:
        """Only what has to be signed by that store."""
        return self._only(lambda item: item.store == store)

    def of_names(self, names: Container[str]) -> Wish:
        """Only what answers these names (of files) and ids (of requests)."""
        return self._only(lambda item: _name(item) in names)

    def halves(self) -> list[Wish]:
        """Two parts of about the same work, if there is much."""
        if len(self.puts) < MANY_PUTS:
            return [self]
        middle = len(self.puts) // 2
        rest = replace(self, gets=(), more=(), puts=self.puts[middle:])
        return [replace(self, puts=self.puts[:middle]), rest]

    def names(self) -> list[str]:
        """Of all that has to be signed."""
        return [_name(item) for item in (*self.gets, *self.puts, *self.more)]

    def _only(self, wanted: Callable[[Get | Put | MoreParts], bool]) -> Wish:
        return replace(
            self,
            gets=tuple(filter(wanted, self.gets)),
            puts=tuple(filter(wanted, self.puts)),
            more=tuple(filter(wanted, self.more)),
        )


def _name(item: Get | Put | MoreParts) -> str:
    return item.name if isinstance(item, Get) else item.request_id
