"""Names of files and versions of sources in messages and tables."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from valohai_agent.checksums import decimal_size
from valohai_agent.printable import printable

__all__ = ["printable", "version_words"]

_HTTP_DATE = re.compile(r"(?P<date>[^|]+)\|(?P<size>\d+)")  # Last-Modified and length
_STORED = re.compile(
    r"(\d{1,20}-)?(?P<size>\d{1,16})-(?P<time>\d{9,11}|\d{18,20})"
)  # (inode,) size, time


def version_words(version: str) -> str:
    """What a source calls a content, for people: ETags without their quotes, times and sizes as such.

    >>> version_words("Sun, 22 Nov 2026 16:00:00 GMT|8"), version_words('"5f3a-9"')
    ('of 2026-11-22 16:00:00 UTC, 8 B', '5f3a-9')
    """
    if found := _HTTP_DATE.fullmatch(version):
        try:
            return _of(parsedate_to_datetime(found["date"]), found["size"])
        except (TypeError, ValueError):
            return version
    if found := _STORED.fullmatch(version):
        seconds = int(found["time"][:-9] if len(found["time"]) > 11 else found["time"])
        try:
            return _of(datetime.fromtimestamp(seconds, timezone.utc), found["size"])
        except (OSError, OverflowError, ValueError):
            return version
    return version.removeprefix("W/").strip('"')


def _of(time: datetime, size: str) -> str:
    when = time.astimezone(timezone.utc)
    return f"of {when:%Y-%m-%d %H:%M:%S} UTC, {decimal_size(int(size))}"
