"""Durations: the vectors of CONTRACT 17.3, and what the library gets wrong (Y-19)."""

from __future__ import annotations

from datetime import timedelta

import pytest

from valohai_dagster.projects.durations import parse_duration


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (90, 90),
        ("90s", 90),
        ("1h 30m 5s", 5405),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("90 minutes", 5400),
        ("2 days", 172_800),
        ("1w", 604_800),
        ("30", 30),
        ("0.5", 0.5),
        ("1H", 3600),
        ("1 hour, 5 min and 3 s", 3903),
        (" 2m ", 120),
    ],
)
def test_173_durations_are_read(value: int | str, seconds: float) -> None:
    assert parse_duration(value) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("h", "no positive duration"),
        ("5x", "unknown unit suffix `x`"),
        ("-1h", "sign"),
        ("+1h", "sign"),
        (0, "not a positive duration"),
        ("0s", "not a positive duration"),
        (-5, "not a positive duration"),
        (True, "not a duration"),
        ("1h 30", "without a unit"),
        ("about 5s", "`about` has no meaning"),
        ("1.2.3s", "has no meaning|without a unit"),
        ("99999999999999w", "longer"),
        (float("nan"), "not a positive duration"),
    ],
)
def test_173_y19_other_texts_are_refused_by_value(value: int | str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_duration(value)


@pytest.mark.parametrize("value", [None, "", "   "])
def test_y19_blank_means_unset(value: str | None) -> None:
    assert parse_duration(value) is None
