"""Names that stay on their line."""

from __future__ import annotations

import pytest

from valohai_dagster.data.printable import printable, version_words


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name.txt", "plain name.txt"),
        ("größe/模型.bin", "größe/模型.bin"),
        ("new\nline", "new\\nline"),
        ("a\r\x1b[2Jb", "a\\r\\x1b[2Jb"),
        ("separator\u2028x", "separator\\u2028x"),
    ],
)
def test_a_name_stays_on_one_line(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert len(printable(name).splitlines()) == 1


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("Sun, 22 Nov 2026 16:00:00 GMT|8", "of 2026-11-22 16:00:00 UTC, 8 B"),
        ("no date|8", "no date|8"),
        ("70591-1795363200", "of 2026-11-22 16:00:00 UTC, 70.6 kB"),
        ("8-1795363200123456789", "of 2026-11-22 16:00:00 UTC, 8 B"),
        ("4711-8-1795363200123456789", "of 2026-11-22 16:00:00 UTC, 8 B"),
        ('"5f3a-9"', "5f3a-9"),
        ('W/"5f3a"', "5f3a"),
        ("1795363200123456", "1795363200123456"),
        ("v1", "v1"),
    ],
)
def test_a_version_is_told_so_that_people_can_read_it(version: str, words: str) -> None:
    assert version_words(version) == words
