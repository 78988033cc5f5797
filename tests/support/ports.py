"""Free TCP ports and waiting with a limit."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def free_port() -> int:
    """A port that was free a moment ago on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(
    question: Callable[[], T], *, seconds: float = 10.0, every: float = 0.02, what: str = "it"
) -> T:
    """The first truthy answer; an AssertionError that names what was waited for after the limit.

    For integration tests, where a real server decides when. Unit tests use FakeClock instead.
    """
    deadline = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s for {what}; last answer: {answer!r}")
        time.sleep(every)
