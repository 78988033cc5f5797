"""The tests' own tools."""

from __future__ import annotations

import socket

import pytest
import pytest_socket

from tests.support import demand
from tests.support.clock import FakeClock


def test_clock_moves_only_when_told(clock: FakeClock) -> None:
    before = clock.now()
    clock.sleep(3)
    assert (clock.now() - before).total_seconds() == clock.monotonic() == 3
    assert clock.slept == [3]


def test_a_missing_need_skips_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(demand.VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception, match="docker: no daemon"):
        demand.missing("docker", "no daemon")


def test_a_missing_need_fails_where_it_was_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(demand.VARIABLE, "redis, docker")
    with pytest.raises(pytest.fail.Exception, match="promises docker"):
        demand.missing("docker", "no daemon")


def test_unit_tests_cannot_open_a_network_socket() -> None:
    with pytest.raises(pytest_socket.SocketBlockedError):
        socket.socket(socket.AF_INET, socket.SOCK_STREAM)
