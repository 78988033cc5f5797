"""How the living conductors share the shards. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

LEASE_SECONDS = 15.0  # a shard whose holder falls silent for this long goes to another conductor
MARGIN_SECONDS = 4.0  # how long before the end of a lease its holder stops trusting in it


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one conductor does next."""

    take: tuple[int, ...] = ()  # free ones to try for
    release: tuple[int, ...] = ()  # to hand over in order


def share_out(me: str, living: Collection[str], holders: Mapping[int, str | None]) -> Share:
    """Even shares that differ by one at most; who has more already keeps the larger one, so few shards move.

    `holders`: every shard with its holder, None for a free one. A shard of a conductor that died waits for the end
    of its lease.
    """
    held = Counter(holder for holder in holders.values() if holder is not None)
    order = sorted({me, *living}, key=lambda name: (-held[name], name))
    size, extra = divmod(len(holders), len(order))
    quota = size + (1 if order.index(me) < extra else 0)
    mine = sorted(shard for shard, holder in holders.items() if holder == me)
    free = sorted(shard for shard, holder in holders.items() if holder is None)
    return Share(take=tuple(free[: max(0, quota - len(mine))]), release=tuple(mine[quota:]))


def is_safe(renewed_at: float | None, now: float) -> bool:
    """Whether a lease that was last renewed then (asked for, not answered) is surely still ours."""
    return renewed_at is not None and 0 <= now - renewed_at < LEASE_SECONDS - MARGIN_SECONDS
