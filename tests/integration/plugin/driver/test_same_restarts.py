"""A step whose machine is reclaimed: Dagster sees one try and one materialization, by its engine and by the conductor."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from dagster import DagsterRunStatus

from tests.integration.plugin.driver.conftest import Case, Comparison
from tests.integration.plugin.driver.seen import kinds, status
from tests.integration.plugin.driver.yamls import CHAIN, ONE, RETRYING
from tests.support.conductor import ConductorSide
from tests.support.dagster_side import Ask, Code, Side, key_of
from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.service import shorten_leases
from tests.support.sim_worker import Play
from valohai_dagster.plugin.results import EXECUTION_ID_KEY

IMAGE = "    image: python:3.11\n"


def restarting(yaml: str) -> str:
    return yaml.replace(IMAGE, f"{IMAGE}    autorestart: true\n")


CHECKPOINT = {"checkpoint.pt": b"epoch 3", "part.csv": b"a\n"}


def test_l32_the_step_follows_the_next_execution_and_materializes_once(same: Comparison) -> None:
    plays = {"prep": [Play.reclaimed(CHECKPOINT), Play.reclaimed({}), Play()]}

    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep", "train"]))
        jobs = [job for job in side.worker.taken if job.step == "prep"]
        assert len({job.execution_id for job in jobs}) == 3
        restart = [[f.name for f in item.files] for job in jobs for item in job.inputs]
        assert restart == [["checkpoint.pt", "part.csv"]] * 2
        (train,) = (job for job in side.worker.taken if job.step == "train")
        assert [file.name for file in train.inputs[0].files] == ["part.csv"]

    seen = same(Case(yaml=restarting(CHAIN), scenario=scenario, plays=plays))
    assert status(seen) == "SUCCESS"
    assert kinds(seen, "prep").count("ASSET_MATERIALIZATION") == 1
    assert kinds(seen, "prep").count("STEP_START") == 1


def test_a_reclaim_costs_none_of_the_users_retries(same: Comparison) -> None:
    """LESSONS 14: the policy allows two; the third failure would be one too many."""
    plays = {
        "prep": [Play.reclaimed({}), Play.failing(), Play.reclaimed({}), Play.failing(), Play()]
    }

    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep"]))

    seen = same(Case(yaml=restarting(ONE), scenario=scenario, plays=plays, defs=RETRYING))
    assert status(seen) == "SUCCESS"
    assert kinds(seen, "prep").count("STEP_RESTARTED") == 2


def test_l31_a_reclaim_without_autorestart_fails_the_step_in_words(same: Comparison) -> None:
    plays = {"prep": Play.reclaimed(CHECKPOINT)}

    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep"]))

    seen = same(Case(yaml=ONE, scenario=scenario, plays=plays))
    assert status(seen) == "FAILURE"


@pytest.fixture
def side(tmp_path: Path, redis_server: RedisServer) -> ConductorSide:
    plays = {"prep": [Play.reclaimed(CHECKPOINT), Play()]}
    code = Code.write(tmp_path / "code", restarting(ONE))
    return ConductorSide(tmp_path / "side", code, plays, redis_server)


def test_the_events_of_a_driven_run_tell_of_the_reclaim(side: ConductorSide) -> None:
    with side:
        run = side.run(Ask(assets=["prep"]))
        records = side.instance.get_records_for_run(run.run_id).records
        texts = [record.event_log_entry.user_message or "" for record in records]
        (link,) = (text for text in texts if text.startswith("execution #2 continues #1"))
        assert "AWS reclaims" in link
        assert sum("stores its outputs" in text for text in texts) == 1
        materialization = side.instance.get_latest_materialization_event(key_of("prep"))
        assert materialization is not None
        assert materialization.asset_materialization is not None
        metadata = materialization.asset_materialization.metadata
        assert metadata["restarts"].value == 1
        assert metadata[EXECUTION_ID_KEY].value == side.worker.taken[-1].execution_id


def test_a_conductor_that_takes_over_goes_on_with_the_next_execution(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_leases(monkeypatch)
    go = threading.Event()
    plays = {"prep": [Play.reclaimed(CHECKPOINT), Play(until=go)]}
    code = Code.write(tmp_path / "code", restarting(ONE))
    with ConductorSide(tmp_path / "side", code, plays, redis_server) as side:
        run = side.create(Ask(assets=["prep"]))
        side.launch(run)
        wait_for(lambda: len(side.worker.taken) == 2, seconds=30, what="the next execution")
        side.service.kill()
        side.service.start()
        go.set()
        assert side.ended(run.run_id).status is DagsterRunStatus.SUCCESS
        assert side.kinds(run.run_id).count("ASSET_MATERIALIZATION") == 1
