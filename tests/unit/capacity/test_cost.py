from __future__ import annotations

from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from valohai_dagster.capacity.cost import Bill, Life, Window, Work, bills, months, price_of

START = datetime(2026, 1, 30, tzinfo=timezone.utc)
PRICE = Decimal("3.6")  # a tenth of a cent per second
ALWAYS = Window(since=START - timedelta(days=999), until=START + timedelta(days=999))


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def life(since: float, until: float, *, checked_in: float | None = None, **values: Any) -> Life:
    return Life(
        **{
            "group": "gpu",
            "machine_id": "m",
            "price_per_hour": PRICE,
            "since": at(since),
            "until": at(until),
            "registered_at": None if checked_in is None else at(checked_in),
            **values,
        }
    )


def work(since: float, until: float, name: str = "e", *, slots: int = 1, **values: Any) -> Work:
    return Work(
        **{
            "execution_id": name,
            "group": "gpu",
            "machine_id": "m",
            "price_per_hour": PRICE / slots,
            "since": at(since),
            "until": at(until),
            "project": "p",
            **values,
        }
    )


def bill(lives: list[Life], works: list[Work], window: Window = ALWAYS) -> Bill:
    found = bills(lives, works, window, key=lambda _: "all", rest=lambda _: "all")
    return found.get("all", Bill())


def test_l40_an_execution_costs_its_time_at_the_price_of_its_slot() -> None:
    assert price_of(PRICE, 3600) == Decimal("3.6")
    assert price_of(PRICE, 1000, slots=4) == Decimal("0.25")
    assert bill([], [work(0, 1000, slots=4)]).work == Decimal("0.25")


def test_l41_start_up_and_idleness_are_told_apart_from_executions() -> None:
    found = bill([life(0, 1000, checked_in=100)], [work(100, 400), work(500, 600, "f")])
    parts = (found.start_up, found.work, found.idle, found.lost, found.total)
    assert [str(part.normalize()) for part in parts] == ["0.1", "0.4", "0.5", "0", "1"]
    assert (found.executions, round(found.hours * 3600)) == (2, 400)


def test_a_machine_that_never_checked_in_was_start_up_only() -> None:
    found = bill([life(0, 1000)], [])
    assert (found.start_up, found.idle) == (Decimal(1), Decimal(0))


def test_work_ends_the_start_up_also_while_nobody_saw_the_worker() -> None:
    late = bill([life(0, 1000, checked_in=800)], [work(50, 1000)])
    never = bill([life(0, 1000)], [work(50, 1000)])
    for found in (late, never):
        assert (found.start_up, found.work) == (Decimal("0.05"), Decimal("0.95"))
        assert (found.idle, found.total) == (Decimal(0), Decimal(1))


def test_time_in_which_a_machine_is_stopped_costs_nothing() -> None:
    running = life(0, 1000, checked_in=0, stopped_seconds=300.0)
    assert bill([running], []).idle == Decimal("0.7")
    stopped = life(0, 1000, checked_in=0, stopped_since=at(400))
    assert bill([stopped], []).idle == Decimal("0.4")


def test_attempts_that_were_lost_are_nobodys() -> None:
    tries = [work(0, 100, lost=True, user="ann"), work(200, 300, user="ann")]
    found = bills([], tries, ALWAYS, key=lambda one: one.user or "", rest=lambda _: "rest")
    assert (found["ann"].work, found["ann"].executions) == (Decimal("0.1"), 1)
    assert (found["rest"].lost, found["rest"].work) == (Decimal("0.1"), Decimal(0))


def test_what_has_no_price_is_counted_in_hours() -> None:
    found = bill([life(0, 3600, price_per_hour=None)], [work(0, 1800, price_per_hour=None)])
    assert (found.unpriced, found.total, found.executions) == (1.5, Decimal(0), 1)


def test_only_what_lies_in_the_window_counts() -> None:
    window = Window(since=at(50), until=at(250))
    found = bill([life(0, 1000, checked_in=100)], [work(200, 900)], window)
    assert (found.start_up, found.work, found.idle) == (
        Decimal("0.05"),
        Decimal("0.05"),
        Decimal("0.1"),
    )
    assert bill([life(0, 40)], [work(0, 40)], window) == Bill()


SPANS = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)).map(sorted)


@given(
    span=SPANS,
    boot=st.integers(0, 1000),
    stopped=st.integers(0, 1000),
    jobs=st.lists(SPANS, max_size=3),
)
def test_parts_make_the_whole_and_months_make_the_year(
    span: list[int], boot: int, stopped: int, jobs: list[list[int]]
) -> None:
    since, until = span[0], span[1] + 5000
    checked_in = since + boot
    lives = [life(since, until, checked_in=checked_in, stopped_seconds=float(stopped))]
    works = [
        work(max(a, checked_in), min(max(b, checked_in), until), f"e{n}", slots=3)
        for n, (a, b) in enumerate(jobs)
        if a < until and b - a < until - since - boot - stopped
    ]
    found = bill(lives, works)
    paid = PRICE * (until - since - stopped) / 3600
    assert abs(found.total - paid) < Decimal("0.00001")
    whole_time = Window(since=at(0), until=at(until))
    lives = [life(since, until, checked_in=checked_in)]
    found = bill(lives, works)
    parts = [bill(lives, works, part) for _, part in months(whole_time)]
    for name in ("work", "start_up", "idle"):
        whole = sum((getattr(part, name) for part in parts), Decimal(0))
        assert abs(whole - getattr(found, name)) < Decimal("0.001")
