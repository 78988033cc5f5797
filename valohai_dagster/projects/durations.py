"""Durations as valohai.yaml writes them (Y-19, Y-20).

The grammar is the library's, `<number><unit>` groups with the unit decided by its first letter. Three of its accidents
are not: a digit-only text is seconds here instead of an IndexError, and zero and signs are refused instead of passing.
"""

from __future__ import annotations

import math
import re
from datetime import timedelta

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_GROUP = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z]*)")
_BETWEEN = re.compile(r"(?:\s|,|;|\band\b)*", re.IGNORECASE)


def parse_duration(value: int | float | str | None) -> timedelta | None:
    """None for None and blank text; ValueError names the value when it is no positive duration."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a duration; write seconds or text such as `1h 30m`")
    seconds = _seconds_of_text(value.strip()) if isinstance(value, str) else float(value)
    if not math.isfinite(seconds) or seconds <= 0:
        raise ValueError(f"{value!r} is not a positive duration")
    try:
        return timedelta(seconds=seconds)
    except OverflowError:
        raise ValueError(f"{value!r} is longer than a duration can be") from None


def _seconds_of_text(text: str) -> float:
    if re.search(r"[-+]", text):
        raise ValueError(f"{text!r} has a sign; durations are positive, such as `1h 30m`")
    groups = list(_GROUP.finditer(text))
    _refuse_leftovers(text, groups)
    if len(groups) == 1 and not groups[0]["unit"]:
        return float(text)
    return sum(float(group["number"]) * _unit_seconds(text, group["unit"]) for group in groups)


def _refuse_leftovers(text: str, groups: list[re.Match[str]]) -> None:
    if not groups:
        raise ValueError(f"{text!r} holds no positive duration; write text such as `1h 30m`")
    ends = [0, *(group.end() for group in groups)]
    starts = [*(group.start() for group in groups), len(text)]
    for end, start in zip(ends, starts, strict=True):
        if not _BETWEEN.fullmatch(text[end:start]):
            raise ValueError(
                f"{text!r} is not a duration: `{text[end:start].strip()}` has no meaning"
            )


def _unit_seconds(text: str, unit: str) -> int:
    if not unit:
        raise ValueError(f"{text!r} has a number without a unit; units are s, m, h, d and w")
    try:
        return _SECONDS[unit[0].lower()]
    except KeyError:
        raise ValueError(
            f"{text!r} has the unknown unit suffix `{unit}`; units are s, m, h, d and w"
        ) from None
