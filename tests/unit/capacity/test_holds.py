from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from valohai_dagster.capacity import holds as holding
from valohai_dagster.capacity.clouds.base import CloudError, Trouble
from valohai_dagster.capacity.model import Hold, Purchase

NOW = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)


def error(trouble: Trouble = Trouble.capacity, **values: object) -> CloudError:
    return CloudError("no", code="x", trouble=trouble, **values)  # type: ignore[arg-type]


def repeated(trouble: Trouble, times: int) -> list[float]:
    """Seconds of each hold when a refusal follows the end of the one before."""
    before: list[Hold] = []
    now, found = NOW, []
    for _ in range(times):
        hold = holding.hold_after(error(trouble), before, now)
        found.append((hold.until - now).total_seconds())
        before, now = [hold], hold.until
    return found


def test_refusals_in_a_row_wait_twice_as_long_each_up_to_a_limit() -> None:
    assert repeated(Trouble.capacity, 6) == [60, 120, 240, 300, 300, 300]
    assert repeated(Trouble.outage, 6) == [5, 10, 20, 40, 80, 120]


@pytest.mark.parametrize("trouble", list(Trouble))
def test_every_trouble_has_a_hold_of_at_most_five_minutes(trouble: Trouble) -> None:
    assert 0 < repeated(trouble, 30)[-1] <= 300


def test_what_the_cloud_asks_to_wait_is_waited() -> None:
    hold = holding.hold_after(error(Trouble.throttled, retry_after=300.0), [], NOW)
    assert hold.until == NOW + timedelta(seconds=300)


def test_a_hold_is_about_what_was_refused() -> None:
    hold = holding.hold_after(error(zone="a", purchase=Purchase.spot), [], NOW)
    assert holding.covers(hold, "a", Purchase.spot)
    assert not holding.covers(hold, "a", Purchase.on_demand)
    assert not holding.covers(hold, "b", Purchase.spot)
    everywhere = holding.hold_after(error(Trouble.credentials), [], NOW)
    assert holding.covers(everywhere, "b", Purchase.on_demand)


def test_words_that_go_on_after_a_refusal_fit_to_it() -> None:
    refused = CloudError("See docs/clouds.md.", code="c", trouble=Trouble.capacity)
    assert holding.hold_after(refused, [], NOW).reason == "See docs/clouds.md"


def test_a_refusal_long_ago_does_not_count() -> None:
    old = Hold(until=NOW - timedelta(hours=2), reason="no", failures=5)
    assert holding.hold_after(error(), [old], NOW).failures == 1


def test_e07_only_the_third_machine_in_a_row_holds() -> None:
    before: list[Hold] = []
    lengths = []
    for number in range(4):
        hold = holding.hold_of_check_ins(before, f"m{number}", NOW)
        lengths.append(hold.until - NOW)
        before = [hold]
    ten = timedelta(minutes=10)
    assert lengths == [timedelta(0), timedelta(0), ten, ten]
    assert "m3" in before[0].reason


def test_holds_of_the_group_do_not_replace_each_other_and_have_no_zone_for_the_planner() -> None:
    lists = holding.hold_of_lists(error(Trouble.credentials), [], NOW)
    launches = holding.hold_after(error(Trouble.quota), [lists], NOW)
    assert (lists.failures, launches.failures, launches.zone) == (1, 1, None)
    assert [hold.zone for hold in holding.in_force([lists, launches], NOW)] == [None, None]
    assert holding.in_force([lists], lists.until) == ()


def test_a_refusal_with_another_time_and_request_is_the_same_refusal() -> None:
    first = "No room (Timestamp: 2026-01-01T10:00:00.5Z, request 01234567-89ab-cdef-0123-456789abcdef); again at 10:01:00"
    later = "No room (Timestamp: 2026-01-01T10:05:12Z, request 89abcdef-0123-4567-89ab-cdef01234567); again at 10:06:12"
    assert holding.gist(first) == holding.gist(later) != holding.gist("No quota")
