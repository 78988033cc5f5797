"""Names that stay on their line."""

from __future__ import annotations

import pytest

from valohai_dagster.data.printable import printable


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
