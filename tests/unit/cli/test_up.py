"""The address of the UI that `up` prints and notes for links."""

from __future__ import annotations

import pytest

from valohai_dagster.cli.up import _address


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:3456"),
        ("0.0.0.0", "http://127.0.0.1:3456"),
        ("::", "http://127.0.0.1:3456"),
        ("::1", "http://[::1]:3456"),
        ("box.example", "http://box.example:3456"),
    ],
)
def test_the_noted_address_can_be_opened(host: str, address: str) -> None:
    assert _address(host, 3456) == address
