"""Asset checks: what the conductor leaves is what Dagster's engine leaves."""

from __future__ import annotations

import pytest

from tests.integration.plugin.driver.conftest import Case, Comparison
from tests.integration.plugin.driver.seen import kinds, status
from tests.integration.plugin.driver.yamls import CHAIN, loaded_with
from tests.support.dagster_side import Ask, Side
from tests.support.sim_worker import Play


def checks_of_prep(*checks: str) -> str:
    return loaded_with(f'checks={{"prep": [{", ".join(f"MetricCheck({c})" for c in checks)}]}}')


GOOD_ENOUGH = 'name="good_enough", condition="accuracy >= 0.9"'
CHECKED = checks_of_prep(GOOD_ENOUGH, 'name="short", condition="epoch < 5", severity="WARN"')
BLOCKING = checks_of_prep(f"{GOOD_ENOUGH}, blocking=True", 'name="short", condition="epoch < 5"')
BLOCKING_WARNING = checks_of_prep(f'{GOOD_ENOUGH}, blocking=True, severity="WARN"')


def reporting(accuracy: float) -> dict[str, Play]:
    return {"prep": Play(metadata=[{"accuracy": accuracy, "epoch": 7}])}


def both(side: Side) -> None:
    side.run(Ask(assets=["prep", "train"]))


@pytest.mark.parametrize("accuracy", [0.95, 0.5], ids=["passes", "fails"])
def test_a_check_that_blocks_nothing(same: Comparison, accuracy: float) -> None:
    seen = same(Case(yaml=CHAIN, defs=CHECKED, scenario=both, plays=reporting(accuracy)))
    assert status(seen) == "SUCCESS"
    assert kinds(seen, "prep").count("ASSET_CHECK_EVALUATION") == 2
    assert kinds(seen, "train")[-1] == "STEP_SUCCESS"


@pytest.mark.parametrize("accuracy", [0.95, 0.5], ids=["passes", "fails"])
def test_a_blocking_check(same: Comparison, accuracy: float) -> None:
    """One that fails fails the step after its outputs are kept, and nothing after it begins."""
    seen = same(Case(yaml=CHAIN, defs=BLOCKING, scenario=both, plays=reporting(accuracy)))
    passed = accuracy > 0.9
    assert status(seen) == ("SUCCESS" if passed else "FAILURE")
    assert kinds(seen, "prep")[-1] == ("STEP_SUCCESS" if passed else "STEP_FAILURE")
    assert "ASSET_MATERIALIZATION" in kinds(seen, "prep")
    assert ("STEP_START" in kinds(seen, "train")) is passed


def test_a_failed_blocking_check_that_only_warns(same: Comparison) -> None:
    seen = same(Case(yaml=CHAIN, defs=BLOCKING_WARNING, scenario=both, plays=reporting(0.5)))
    assert status(seen) == "SUCCESS"


def test_a_check_of_a_metric_that_was_not_reported(same: Comparison) -> None:
    seen = same(Case(yaml=CHAIN, defs=CHECKED, scenario=both))
    assert status(seen) == "SUCCESS"


def test_checks_of_a_step_that_failed_were_planned_and_never_evaluated(same: Comparison) -> None:
    seen = same(Case(yaml=CHAIN, defs=CHECKED, scenario=both, plays={"prep": Play.failing()}))
    assert "ASSET_CHECK_EVALUATION_PLANNED" in kinds(seen)
    assert "ASSET_CHECK_EVALUATION" not in kinds(seen)
    assert seen.checks


def test_a_check_of_one_partition(same: Comparison) -> None:
    days = 'dg.DailyPartitionsDefinition(start_date="2026-01-01", end_date="2026-01-05")'
    defs = loaded_with(f'partitions_def={days}, checks={{"prep": [MetricCheck({GOOD_ENOUGH})]}}')

    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep"], partition="2026-01-02"))

    seen = same(Case(yaml=CHAIN, defs=defs, scenario=scenario, plays=reporting(0.95)))
    assert status(seen) == "SUCCESS"


def test_a_blocking_check_where_outputs_are_enough(same: Comparison) -> None:
    """The executor's config may let steps begin once the outputs before them are there."""

    def scenario(side: Side) -> None:
        early = {"in_process": {"step_dependency_config": {"require_upstream_step_success": False}}}
        side.run(Ask(assets=["prep", "train"], execution=early))

    seen = same(Case(yaml=CHAIN, defs=BLOCKING, scenario=scenario, plays=reporting(0.5)))
    assert status(seen) == "FAILURE"
