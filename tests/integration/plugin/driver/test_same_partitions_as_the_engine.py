"""Partitions and backfills: what the conductor leaves is what Dagster's engine leaves."""

from __future__ import annotations

from tests.integration.plugin.driver.conftest import Case, Comparison
from tests.integration.plugin.driver.seen import stale, status
from tests.integration.plugin.driver.yamls import CHAIN, loaded_with
from tests.support.dagster_side import ONE_AT_A_TIME, QUEUED, Ask, Side
from tests.support.sim_worker import Play

DAYS = ["2026-01-01", "2026-01-02", "2026-01-03"]
_DEFINITION = 'dg.DailyPartitionsDefinition(start_date="2026-01-01", end_date="2026-01-05")'
DAILY = loaded_with(f"partitions_def={_DEFINITION}")
IN_ONE_RUN = loaded_with(
    f"partitions_def={_DEFINITION}, backfill_policy=dg.BackfillPolicy.single_run()"
)
OF_YESTERDAY = loaded_with(
    f"partitions_def={_DEFINITION}, partition_mappings="
    '{"train": {"prep": dg.TimeWindowPartitionMapping(start_offset=-1, end_offset=-1)}}'
)
BOTH_SIDES = "dg.StaticPartitionsDefinition(['left', 'right'])"
TWO_DIMENSIONS = loaded_with(
    f'partitions_def=dg.MultiPartitionsDefinition({{"day": {_DEFINITION}, "side": {BOTH_SIDES}}})'
)
UPSTREAM_ONLY = loaded_with(f'partitions_def={{"prep": {_DEFINITION}}}')


def test_one_partition_of_a_chain(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep", "train"], partition=DAYS[0]))
        side.run(Ask(assets=["prep"], partition=DAYS[1]))
        side.run(Ask(assets=["train"], partition=DAYS[1]))

    seen = same(Case(yaml=CHAIN, defs=DAILY, scenario=scenario))
    assert [status(seen, run) for run in range(3)] == ["SUCCESS"] * 3
    fresh = dict.fromkeys(DAYS[:2], "FRESH")
    assert seen.assets["digits/train"]["partitions"]["materialized"] == fresh


def test_a_failed_partition(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep"], partition=DAYS[0]))
        side.worker.plays["prep"] = Play.failing()
        side.run(Ask(assets=["prep", "train"], partition=DAYS[1]))

    seen = same(Case(yaml=CHAIN, defs=DAILY, scenario=scenario))
    assert seen.assets["digits/prep"]["partitions"]["failed"] == [DAYS[1]]


def test_a_partition_that_depends_on_another_ones(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.run(Ask(assets=["prep"], partition=DAYS[0]))
        side.worker.plays["prep"] = Play(outputs={"part.csv": b"two\n"})
        side.run(Ask(assets=["prep"], partition=DAYS[1]))
        side.run(Ask(assets=["train"], partition=DAYS[1]))

    assert status(same(Case(yaml=CHAIN, defs=OF_YESTERDAY, scenario=scenario)), 2) == "SUCCESS"


def test_a_partition_of_two_dimensions(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        dimensions = {"dagster/partition/day": DAYS[0], "dagster/partition/side": "left"}
        every = Ask(assets=["prep", "train"], tags=dimensions, partition=f"{DAYS[0]}|left")
        side.run(every)

    seen = same(Case(yaml=CHAIN, defs=TWO_DIMENSIONS, scenario=scenario))
    assert status(seen) == "SUCCESS"


def test_an_asset_without_partitions_after_one_with_them(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        for day in DAYS[:2]:
            side.run(Ask(assets=["prep"], partition=day))
        side.run(Ask(assets=["train"]))

    seen = same(Case(yaml=CHAIN, defs=UPSTREAM_ONLY, scenario=scenario))
    assert stale(seen)["train"] == "FRESH"


def test_a_backfill_with_a_run_per_partition(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.backfill("prep", "train", partitions=DAYS)

    case = Case(yaml=CHAIN, defs=DAILY, scenario=scenario, options=QUEUED, at_once="runs")
    seen = same(case)
    assert [status(seen, run) for run in range(len(DAYS))] == ["SUCCESS"] * 3
    every = dict.fromkeys(DAYS, "FRESH")
    assert seen.assets["digits/train"]["partitions"]["materialized"] == every


def test_a_backfill_of_a_range_in_one_run(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.backfill("prep", "train", partitions=DAYS)

    seen = same(Case(yaml=CHAIN, defs=IN_ONE_RUN, scenario=scenario, options=QUEUED))
    assert len(seen.runs) == 1
    assert status(seen) == "SUCCESS"
    every = dict.fromkeys(DAYS, "FRESH")
    assert seen.assets["digits/train"]["partitions"]["materialized"] == every


def test_a_backfill_with_a_failing_run(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        side.backfill("prep", "train", partitions=DAYS[:2])

    plays = {"train": Play.failing()}
    case = Case(yaml=CHAIN, defs=DAILY, scenario=scenario, plays=plays, options=ONE_AT_A_TIME)
    seen = same(case)
    assert seen.assets["digits/train"]["partitions"]["failed"] == DAYS[:2]
