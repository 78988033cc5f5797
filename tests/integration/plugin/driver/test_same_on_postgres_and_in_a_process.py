"""The comparison where it counts in production: Postgres storages, and a conductor that is a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tests.integration.plugin.driver.conftest import Case, Comparison
from tests.integration.plugin.driver.seen import stale, status
from tests.integration.plugin.driver.yamls import CHAIN, DIAMOND, loaded_with
from tests.support.conductor import ConductorProcessSide
from tests.support.dagster_side import Ask, Side
from tests.support.sim_worker import Play

EVERY = ("prep", "left", "right", "join")
EVERYTHING = loaded_with(
    "retry_policy=dg.RetryPolicy(max_retries=1), pool='gpu', "
    "checks={'prep': [MetricCheck(name='good', condition='accuracy > 0.9', blocking=True)]}"
)
GOOD = Play(metadata=[{"accuracy": 0.95}])


def a_long_story(side: Side) -> None:
    """A retry, a blocking check, a failing branch, and what was left is made from there."""
    side.instance.event_log_storage.set_concurrency_slots("gpu", 1)
    plays: dict[str, Play | Sequence[Play]] = {
        "prep": replace(GOOD, metadata=[{"accuracy": 0.5}]),
        "left": [Play.failing(), Play()],
    }
    side.worker.plays.update(plays)
    side.run(Ask(assets=EVERY))
    side.worker.plays["prep"] = GOOD
    side.run(Ask(assets=EVERY))
    side.worker.plays["right"] = Play.failing(stderr="boom\n")
    failed = side.run(Ask(assets=EVERY))
    side.worker.plays["right"] = Play()
    side.run(Ask(assets=EVERY, parent=failed.run_id, from_failure=True))


def test_on_postgres(same_on_postgres: Comparison) -> None:
    case = Case(yaml=DIAMOND, defs=EVERYTHING, scenario=a_long_story, at_once="steps")
    seen = same_on_postgres(case)
    ends = [status(seen, run) for run in range(4)]
    assert ends == ["FAILURE", "SUCCESS", "FAILURE", "SUCCESS"]
    assert set(stale(seen).values()) == {"FRESH"}
    assert seen.pools == {"gpu": {"slots": 1, "taken": 0, "waiting": 0}}


def test_with_a_conductor_process(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep", "train", "report"]))

    seen = same(Case(yaml=CHAIN, scenario=scenario, conductor=ConductorProcessSide))
    assert status(seen) == "SUCCESS"
