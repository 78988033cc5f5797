"""What a machine must have for a test, and what happens when it has not.

Without `VALOHAI_TEST_REQUIRE` a test whose need is missing is skipped with the reason. With it (CI sets the full
list) the same test fails instead, so that a green run proves that nothing was left out.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

VARIABLE = "VALOHAI_TEST_REQUIRE"
KNOWN = (
    "docker",
    "chromium",
    "redis",
    "redis_tls",
    "postgres",
    "namespace",
    "podman",
    "ssh",
    "stores",
)


def required() -> set[str]:
    """Names that this machine promises to have; `all` stands for every known one."""
    names = {name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()}
    return names | set(KNOWN) if "all" in names else names


def missing(name: str, reason: str) -> NoReturn:
    """Skips the test, or fails it where the machine promised to have the thing."""
    if name not in KNOWN:
        raise ValueError(f"{name!r} is not one of {', '.join(KNOWN)}")
    if name in required():
        pytest.fail(f"{VARIABLE} promises {name}, but: {reason}", pytrace=False)
    pytest.skip(f"{name}: {reason}")
