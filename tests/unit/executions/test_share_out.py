"""How conductors share shards, and when one may trust its lease."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from valohai_dagster.executions.share_out import (
    LEASE_SECONDS,
    MARGIN_SECONDS,
    is_safe,
    share_out,
)

NAMES = st.sampled_from(["a", "b", "c", "d", "e"])


def test_the_first_conductor_takes_everything():
    share = share_out("a", [], dict.fromkeys(range(8)))
    assert share.take == tuple(range(8))
    assert share.release == ()


def test_one_that_holds_everything_gives_a_newcomer_its_half():
    share = share_out("a", ["a", "b"], dict.fromkeys(range(8), "a"))
    assert (share.take, share.release) == ((), (4, 5, 6, 7))


def test_a_newcomer_takes_nothing_that_is_held():
    share = share_out("b", ["a", "b"], dict.fromkeys(range(8), "a"))
    assert (share.take, share.release) == ((), ())


def test_a_dead_conductors_shards_wait_for_the_end_of_its_lease():
    holders = {0: "a", 1: "dead", 2: None, 3: "a"}
    assert share_out("a", ["a"], holders).take == (2,)


def test_who_has_more_already_keeps_the_larger_share():
    holders = {0: "b", 1: "b", 2: "a"}
    assert share_out("b", ["a", "b"], holders).release == ()
    assert share_out("a", ["a", "b"], holders).take == ()


def test_more_conductors_than_shards_leave_some_without():
    holders = {0: "a", 1: "b"}
    assert share_out("c", ["a", "b", "c"], holders).take == ()
    assert share_out("a", ["a", "b", "c"], holders).release == ()


@given(
    living=st.sets(NAMES, min_size=1),
    shards=st.lists(st.one_of(st.none(), NAMES), min_size=1, max_size=16),
)
def test_shares_become_even_and_stay_so(living: set[str], shards: list[str | None]):
    """Whoever holds what at first; a dead holder's lease ends before the first round."""
    holders = {number: who if who in living else None for number, who in enumerate(shards)}
    for _ in range(3):
        for me in sorted(living):
            share = share_out(me, living, holders)
            holders.update(dict.fromkeys(share.release))
        for me in sorted(living):
            for shard in share_out(me, living, holders).take:
                assert holders[shard] is None
                holders[shard] = me
    counts = Counter(holders.values())
    assert None not in counts
    sizes = [counts[me] for me in living]
    assert max(sizes) - min(sizes) <= 1
    for me in living:
        share = share_out(me, living, holders)
        assert (share.take, share.release) == ((), ())


def test_a_lease_is_trusted_from_its_renewal_until_a_margin_before_its_end():
    assert is_safe(100.0, 100.0)
    assert is_safe(100.0, 100.0 + LEASE_SECONDS - MARGIN_SECONDS - 0.1)
    assert not is_safe(100.0, 100.0 + LEASE_SECONDS - MARGIN_SECONDS)
    assert not is_safe(100.0, 100.0 + 3600)


def test_a_lease_that_was_never_renewed_is_not_trusted():
    assert not is_safe(None, 100.0)
