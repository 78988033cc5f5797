"""What goes first when a cache is full (I-35): properties of the pure part."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from valohai_agent.cache.worth import (
    BLOCK_BYTES,
    MAX_USES,
    Kept,
    Room,
    aged_worth,
    choose,
    order,
    worth,
)

seconds = st.floats(0, 10_000)
sizes = st.integers(0, 10**13)
uses = st.integers(1, 10**6)
clocks = st.floats(0, 1)
kept_files = st.lists(
    st.builds(
        Kept,
        key=st.uuids().map(str),
        size=st.integers(0, 1000),
        worth=st.floats(0, 10),
        used_at=st.floats(0, 10),
    ),
    unique_by=lambda one: one.key,
)


@given(clock=clocks, seconds=seconds, more=seconds, size=sizes, uses=uses)
def test_i35_what_is_dearer_to_fetch_is_worth_no_less(
    clock: float, seconds: float, more: float, size: int, uses: int
) -> None:
    cheap = worth(clock=clock, seconds=seconds, size=size, uses=uses)
    assert worth(clock=clock, seconds=seconds + more, size=size, uses=uses) >= cheap


@given(clock=clocks, seconds=seconds, size=sizes, more=sizes, uses=uses)
def test_i35_what_takes_more_room_is_worth_no_more(
    clock: float, seconds: float, size: int, more: int, uses: int
) -> None:
    small = worth(clock=clock, seconds=seconds, size=size, uses=uses)
    assert worth(clock=clock, seconds=seconds, size=size + more, uses=uses) <= small


@given(clock=clocks, seconds=seconds, size=sizes, uses=uses, more=uses)
def test_i35_what_is_used_more_often_is_worth_no_less(
    clock: float, seconds: float, size: int, uses: int, more: int
) -> None:
    rare = worth(clock=clock, seconds=seconds, size=size, uses=uses)
    assert worth(clock=clock, seconds=seconds, size=size, uses=uses + more) >= rare


@given(seconds=seconds, size=sizes)
def test_an_old_favourite_is_worth_no_more_than_a_bounded_number_of_uses(
    seconds: float, size: int
) -> None:
    favourite = worth(clock=0, seconds=seconds, size=size, uses=10**6)
    assert favourite == worth(clock=0, seconds=seconds, size=size, uses=MAX_USES)


@given(seconds=seconds, size=sizes, age=st.floats(0, 10**8), more=st.floats(0, 10**8))
def test_on_a_share_worth_falls_with_the_time_since_the_last_use(
    seconds: float, size: int, age: float, more: float
) -> None:
    now = aged_worth(seconds=seconds, size=size, age=age)
    assert aged_worth(seconds=seconds, size=size, age=age + more) <= now


@given(kept=kept_files, excess=st.integers(0, 20_000), used=st.sets(st.integers(0, 60)))
def test_i35_enough_goes_in_order_and_nothing_that_is_in_use(
    kept: list[Kept], excess: int, used: set[int]
) -> None:
    in_use = {one.key for place, one in enumerate(kept) if place in used}
    chosen = choose(kept, excess, in_use=lambda one: one.key in in_use)
    idle = [one for one in order(kept) if one.key not in in_use]
    assert list(chosen) == idle[: len(chosen)]  # the least worth ones
    freed = sum(one.size for one in chosen)
    assert freed >= excess or len(chosen) == len(idle)
    assert freed - (chosen[-1].size if chosen else 0) < excess or not chosen  # no more than needed


@given(
    cached=sizes,
    used=sizes,
    total=st.integers(1, 10**14),
    limit=st.none() | sizes,
    coming=sizes,
)
def test_excess_is_what_must_go_to_keep_both_limits(
    cached: int, used: int, total: int, limit: int | None, coming: int
) -> None:
    room = Room(cached=cached, disk_used=used, disk_total=total, max_bytes=limit, disk_mark=0.8)
    excess = room.excess(coming)
    assert excess >= 0
    assert used + coming - excess <= int(total * 0.8)
    assert limit is None or cached + coming - excess <= limit


def test_whatever_nobody_uses_goes_after_a_bounded_number_of_evictions() -> None:
    """The clock of GreedyDual: newcomers that are never used again push out the dearest old file in the end."""
    clock = 0.0
    old = Kept(
        key="old", size=BLOCK_BYTES, worth=worth(clock=0, seconds=5, size=BLOCK_BYTES, uses=9)
    )
    held = [old]
    for number in range(1000):
        value = worth(clock=clock, seconds=0.5, size=BLOCK_BYTES, uses=1)
        held.append(Kept(key=f"{number}", size=BLOCK_BYTES, worth=value, used_at=number))
        (gone,) = choose(held, 1, in_use=lambda one: False) if len(held) > 3 else (None,)
        if gone is not None:
            held.remove(gone)
            clock = max(clock, gone.worth)
        if gone is old:
            break
    assert old not in held
