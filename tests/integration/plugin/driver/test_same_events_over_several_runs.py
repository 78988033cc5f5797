"""Runs that build on earlier ones: selection, re-execution, staleness. Engine and conductor leave the same."""

from __future__ import annotations

from dataclasses import replace

import dagster as dg

from tests.integration.plugin.driver.conftest import Case, Comparison
from tests.integration.plugin.driver.seen import kinds, stale, status
from tests.integration.plugin.driver.yamls import CHAIN, DIAMOND, ONE
from tests.support.dagster_side import Ask, Side, key_of
from tests.support.sim_worker import Play

OTHER = Play(outputs={"part.csv": b"other\n"})


def test_an_asset_whose_upstream_was_made_by_another_run(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep"]))
        side.run(Ask(assets=["train"]))

    seen = same(Case(yaml=CHAIN, scenario=scenario))
    assert stale(seen) == {"prep": "FRESH", "train": "FRESH", "report": "MISSING"}


def test_doing_the_same_again_makes_nothing_stale_and_another_result_does(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep", "train"]))
        side.run(Ask(assets=["prep"]))
        before = side.staleness()
        assert before == {"prep": "FRESH", "train": "FRESH", "report": "MISSING"}
        side.worker.plays["prep"] = OTHER
        side.run(Ask(assets=["prep"]))

    seen = same(Case(yaml=CHAIN, scenario=scenario))
    assert stale(seen) == {"prep": "FRESH", "train": "STALE", "report": "MISSING"}


def test_changed_code_makes_an_asset_stale_until_it_ran(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.edit_project("python:3.11", "python:3.10")  # the other side has left its edit
        side.run(Ask(assets=["prep"]))
        side.edit_project("python:3.10", "python:3.11")
        assert side.staleness() == {"prep": "STALE"}
        side.run(Ask(assets=["prep"]))
        assert side.staleness() == {"prep": "FRESH"}

    seen = same(Case(yaml=ONE, scenario=scenario))
    assert stale(seen) == {"prep": "FRESH"}


def test_an_upstream_that_somebody_reported_by_hand(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.instance.report_runless_asset_event(dg.AssetMaterialization(key_of("prep")))
        side.run(Ask(assets=["train"]))
        side.run(Ask(assets=["prep"]))
        side.instance.report_runless_asset_event(dg.AssetMaterialization(key_of("prep")))
        side.run(Ask(assets=["train"]))

    seen = same(Case(yaml=CHAIN, scenario=scenario))
    assert [status(seen, run) for run in range(3)] == ["FAILURE", "SUCCESS", "FAILURE"]


def test_a_re_execution_from_failure(same: Comparison) -> None:
    """Steps that succeeded are not run again, and their files are the parent run's, not the latest."""

    def scenario(side: Side) -> None:
        side.worker.plays["left"] = Play.failing()
        failed = side.run(Ask(assets=["prep", "left", "right", "join"]))
        side.worker.plays.update(left=Play(), prep=OTHER)
        side.run(Ask(assets=["prep"]))
        again = Ask(assets=["prep", "left", "right", "join"], parent=failed.run_id)
        side.run(replace(again, from_failure=True))

    seen = same(Case(yaml=DIAMOND, scenario=scenario, at_once="steps"))
    assert [status(seen, run) for run in range(3)] == ["FAILURE", "SUCCESS", "SUCCESS"]
    assert "STEP_START" not in kinds(seen, "prep", run=2)
    assert kinds(seen, "join", run=2)[-1] == "STEP_SUCCESS"
    assert stale(seen)["left"] == "STALE"


def test_a_re_execution_of_all_and_of_one_step(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        every = Ask(assets=["prep", "train", "report"])
        first = side.run(every)
        side.worker.plays["prep"] = OTHER
        second = side.run(replace(every, parent=first.run_id))
        side.run(replace(every, parent=second.run_id, step_keys=["digits__train"]))
        side.run(replace(every, parent=first.run_id, step_keys=["digits__train"]))

    seen = same(Case(yaml=CHAIN, scenario=scenario))
    assert [status(seen, run) for run in range(4)] == ["SUCCESS"] * 4
    assert "STEP_START" not in kinds(seen, "prep", run=2)


def test_a_run_of_a_backfill(same: Comparison) -> None:
    """Whatever this release of Dagster makes of the tag in the materialization."""

    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep"], tags={"dagster/backfill": "abcdefgh"}))

    assert status(same(Case(yaml=ONE, scenario=scenario))) == "SUCCESS"
