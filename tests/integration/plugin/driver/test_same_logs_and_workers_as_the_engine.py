"""Log capture and worker events, as Dagster's default executor (a process per step) tells them."""

from __future__ import annotations

from tests.integration.plugin.driver.conftest import Case, Comparison
from tests.integration.plugin.driver.exclusions import MULTIPROCESS
from tests.integration.plugin.driver.seen import kinds, status
from tests.integration.plugin.driver.yamls import CHAIN, RETRYING
from tests.support.dagster_side import Ask, MultiprocessSide, Side
from tests.support.sim_worker import Play


def test_each_try_of_each_step_has_its_log_and_its_worker(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep", "train"]))

    plays = {"prep": Play(stderr="working\n"), "train": [Play.failing(stderr="boom\n"), Play()]}
    case = Case(
        yaml=CHAIN,
        scenario=scenario,
        plays=plays,
        defs=RETRYING,
        engine=MultiprocessSide,
        exclusions=MULTIPROCESS,
        at_once="steps",  # our log is there when the step waits for a machine, the engine's when its process runs
    )
    seen = same(case)
    assert status(seen) == "SUCCESS"
    every = kinds(seen)
    assert every.count("STEP_WORKER_STARTING") == 3
    assert every.count("STEP_WORKER_STARTED") == 3
    assert every.count("LOGS_CAPTURED") == 3
    assert [log["stderr"] for log in seen.runs[0]["logs"]["digits__train"]] == ["boom\n", ""]
