"""Refusals that came after a launch was accepted."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from tests.support.clock import FakeClock
from tests.support.clouds.paper import refusal
from valohai_dagster.capacity.clouds.base import CloudError, Trouble
from valohai_dagster.capacity.clouds.refusals import FRESH, Refusals
from valohai_dagster.capacity.model import Purchase


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(datetime(2026, 1, 1, tzinfo=timezone.utc))


def test_a_refusal_is_raised_once_and_where_it_belongs(clock: FakeClock) -> None:
    kept = Refusals(clock)
    kept.keep("a", Purchase.spot, refusal(Trouble.capacity))
    kept.raise_kept("a", Purchase.on_demand)
    kept.raise_kept("b", Purchase.spot)
    with pytest.raises(CloudError):
        kept.raise_kept("a", Purchase.spot)
    kept.raise_kept("a", Purchase.spot)


def test_a_refusal_of_long_ago_says_nothing_about_the_next_launch(clock: FakeClock) -> None:
    kept = Refusals(clock)
    kept.keep("", Purchase.on_demand, refusal(Trouble.capacity))
    clock.advance(FRESH.total_seconds())
    kept.raise_kept("", Purchase.on_demand)
