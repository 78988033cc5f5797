"""What a cached file is worth keeping: the pure part of eviction (I-35).

GreedyDual-Size-Frequency. A file's worth is `clock + uses * seconds / size`: the seconds that fetching it again costs,
per byte that it occupies, times how often it was wanted. When a file is evicted the clock moves up to its worth, and
only files that are used again are reckoned from the new clock: whatever nobody uses falls behind and goes, however
dear it once was. Equal files go in the order of their last use. A share has no such clock, so there a file's worth
falls with the time since its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MAX_USES = 64  # more do not count, so that yesterday's favourite is gone within a bounded time
MIN_SECONDS = 0.001  # of one request, however fast the measured one was
DAY = 86400.0
BLOCK_BYTES = 4096  # what the smallest file occupies


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One file that may be evicted. `used_at`: seconds since the epoch."""

    key: str
    size: int
    worth: float
    used_at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Room:
    """The limits of a cache and what is there; bytes."""

    cached: int
    disk_used: int
    disk_total: int
    max_bytes: int | None = None
    disk_mark: float = 1.0

    def excess(self, coming: int = 0) -> int:
        """How many bytes have to go before `coming` bytes fit; 0 when they do."""
        over_mark = self.disk_used + coming - int(self.disk_total * self.disk_mark)
        over_limit = 0 if self.max_bytes is None else self.cached + coming - self.max_bytes
        return max(0, over_mark, over_limit)


def worth(*, clock: float, seconds: float, size: int, uses: int) -> float:
    """Higher is kept longer. `seconds`: what fetching took, as measured."""
    value = max(seconds, MIN_SECONDS) / max(size, BLOCK_BYTES)
    return clock + max(1, min(uses, MAX_USES)) * value


def aged_worth(*, seconds: float, size: int, age: float) -> float:
    """The same where nobody keeps a clock: what was used long ago is worth less. `age`: seconds since the last use."""
    return worth(clock=0.0, seconds=seconds, size=size, uses=1) / (1.0 + max(0.0, age) / DAY)


def order(kept: Iterable[Kept]) -> list[Kept]:
    """The first one goes first."""
    return sorted(kept, key=lambda one: (one.worth, one.used_at, one.key))


def choose(kept: Iterable[Kept], excess: int, *, in_use: Callable[[Kept], bool]) -> Sequence[Kept]:
    """What to evict, in order, so that `excess` bytes go if they can; never what is in use."""
    chosen: list[Kept] = []
    for one in order(kept):
        if excess <= 0:
            break
        if not in_use(one):
            chosen.append(one)
            excess -= one.size
    return chosen
