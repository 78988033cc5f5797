"""Pools: a step waits, is told, and lets go of its slot as with Dagster's engine."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

from tests.integration.plugin.driver.conftest import Case, Comparison
from tests.integration.plugin.driver.exclusions import IN_PROCESS
from tests.integration.plugin.driver.seen import status
from tests.integration.plugin.driver.yamls import CHAIN, DIAMOND, loaded_with
from tests.support.conductor import ConductorSide
from tests.support.dagster_side import Ask, Code, Side
from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.sim_worker import Play
from valohai_agent import protocol as p

POOLED = loaded_with('pool="gpu"')
BLOCKED = "Step blocked by limit for pool gpu"
TOLD = replace(IN_PROCESS, kept={BLOCKED: "the one engine event that tells of a pool"})


def test_a_step_that_waits_for_a_pool_says_so_and_goes_on_when_there_is_a_slot(
    same: Comparison,
) -> None:
    def scenario(side: Side) -> None:
        storage = side.instance.event_log_storage
        storage.set_concurrency_slots("gpu", 1)
        assert storage.claim_concurrency_slot("gpu", "somebody-else", "step").is_claimed
        run = side.create(Ask(assets=["prep", "train"]))

        def let_go() -> None:
            wait_for(lambda: told(side, run.run_id), seconds=60, what="the step to be blocked")
            storage.free_concurrency_slots_for_run("somebody-else")

        freeing = threading.Thread(target=let_go)
        freeing.start()
        side.launch(run)
        side.ended(run.run_id)
        freeing.join()

    seen = same(Case(yaml=CHAIN, defs=POOLED, scenario=scenario, exclusions=TOLD))
    assert status(seen) == "SUCCESS"
    assert seen.pools == {"gpu": {"slots": 1, "taken": 0, "waiting": 0}}


def told(side: Side, run_id: str) -> bool:
    records = side.instance.get_records_for_run(run_id).records
    return any(record.event_log_entry.message == BLOCKED for record in records)


def test_a_failed_step_lets_go_of_its_slot(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.instance.event_log_storage.set_concurrency_slots("gpu", 1)
        side.run(Ask(assets=["prep", "train"]))

    plays = {"prep": Play.failing()}
    seen = same(Case(yaml=CHAIN, defs=POOLED, scenario=scenario, plays=plays))
    assert seen.pools["gpu"]["taken"] == 0


def test_branches_of_one_run_take_turns(tmp_path: Path, redis_server: RedisServer) -> None:
    """Only the conductor runs branches at once in one process, so there is nothing to compare."""
    running: list[str] = []
    together: list[int] = []

    def enter(job: p.Job) -> None:
        running.append(job.step)
        together.append(len(running))
        time.sleep(0.1)
        running.remove(job.step)

    plays = {step: Play(while_running=enter) for step in ("left", "right")}
    code = Code.write(tmp_path / "code", DIAMOND, defs=POOLED)
    with ConductorSide(tmp_path / "side", code, plays, redis_server) as side:
        side.instance.event_log_storage.set_concurrency_slots("gpu", 1)
        run = side.run(Ask(assets=["prep", "left", "right", "join"]))
        assert run.is_success
        assert together == [1, 1]
        info = side.instance.event_log_storage.get_concurrency_info("gpu")
        assert not info.claimed_slots
        assert not info.pending_steps
