"""Which rules of Dagster's queue concern a run."""

from __future__ import annotations

from typing import Any

import dagster as dg
import pytest

from valohai_dagster.plugin.compat import ConcurrencyConfig, RunOpConcurrency, RunQueueConfig
from valohai_dagster.plugin.coordinator import with_defaults
from valohai_dagster.plugin.queue_rules import DRIVER_TAG, bounds_engine_runs, rules_for


def config(settings: dict[str, Any] | None = None, **queue: Any) -> ConcurrencyConfig:
    """As the instance resolves it: the section `concurrency` over the coordinator's own configuration."""
    values = {"max_concurrent_runs": -1, "tag_concurrency_limits": [], **queue}
    return ConcurrencyConfig.from_concurrency_settings(settings or {}, RunQueueConfig(**values))


def run(*, pools: RunOpConcurrency | None = None, **tags: str) -> dg.DagsterRun:
    return dg.DagsterRun(job_name="job", tags=tags, run_op_concurrency=pools)


def texts(found: dg.DagsterRun, concurrency: ConcurrencyConfig) -> list[str]:
    return [rule.text for rule in rules_for(found, concurrency)]


def pools_of(*roots: str, free_root: bool = False) -> RunOpConcurrency:
    return RunOpConcurrency(
        root_key_counts=dict.fromkeys(roots, 1),
        has_unconstrained_root_nodes=free_root,
        all_pools={*roots, "later"},
    )


def test_without_limits_nothing_concerns_a_run():
    assert texts(run(team="a"), config()) == []


@pytest.mark.parametrize("limit", [0, 1, 25])
def test_a_limit_of_runs_concerns_every_run(limit: int):
    assert texts(run(), config(max_concurrent_runs=limit)) == [
        f"at most {limit} run{'' if limit == 1 else 's'} at once"
    ]


def test_the_section_concurrency_wins_over_the_coordinators_own():
    settings = {"runs": {"max_concurrent_runs": 3}}
    assert texts(run(), config(settings)) == ["at most 3 runs at once"]
    assert texts(run(), config({"runs": {"max_concurrent_runs": -1}}, max_concurrent_runs=3)) == []


@pytest.mark.parametrize(
    ("value", "shown", "counted"),
    [
        (None, "team", True),
        ("a", "team=a", False),
        ({"applyLimitPerUniqueValue": True}, "team=a", False),
        ({"applyLimitPerUniqueValue": False}, "team", True),
    ],
)
def test_limits_on_tags_concern_who_carries_the_tag(value: Any, shown: str, counted: bool):
    limit = {"key": "team", "limit": 2, **({"value": value} if value is not None else {})}
    limits = config(tag_concurrency_limits=[limit])
    (rule,) = rules_for(run(team="a"), limits)
    assert rule.text == f"at most 2 runs with the tag {shown} at once"
    assert rule.counts(run(team="a"))
    assert rule.counts(run(team="b")) is counted
    assert not rule.counts(run(other="a"))
    assert texts(run(other="a"), limits) == []


def test_a_limit_on_another_value_does_not_concern_a_run():
    limit = {"key": "team", "value": "a", "limit": 1}
    assert texts(run(team="b"), config(tag_concurrency_limits=[limit])) == []


def test_pools_of_run_granularity_concern_all_runs_that_use_them():
    limits = config({"pools": {"granularity": "run"}})
    rules = rules_for(run(pools=pools_of("gpu", free_root=True)), limits)
    assert [rule.name for rule in rules] == ["gpu", "later"]
    assert rules[0].counts(run(pools=pools_of("gpu")))
    assert not rules[0].counts(run())


@pytest.mark.parametrize("settings", [{}, {"pools": {"granularity": "op"}}])
def test_pools_of_op_granularity_are_waited_for_by_the_steps(settings: dict[str, Any]):
    assert texts(run(pools=pools_of("gpu")), config(settings)) == []


def test_once_queued_a_run_whose_first_steps_all_wait_is_held_by_their_pools():
    def held(pools: RunOpConcurrency) -> list[str]:
        return [rule.name for rule in rules_for(run(pools=pools), config(), root_pools=True)]

    assert held(pools_of("gpu")) == ["gpu"]
    assert held(pools_of("gpu", free_root=True)) == []


def test_the_queue_may_be_told_to_ignore_pools():
    ignoring = config(
        {"pools": {"granularity": "run"}}, should_block_op_concurrency_limited_runs=False
    )
    assert texts(run(pools=pools_of("gpu")), ignoring) == []


def test_without_a_limit_of_runs_dagsters_own_engine_gets_one_of_its_own():
    defaults = with_defaults({"tag_concurrency_limits": [{"key": "team", "limit": 1}]})
    assert defaults["max_concurrent_runs"] == -1
    assert defaults["tag_concurrency_limits"] == [
        {"key": "team", "limit": 1},
        {"key": DRIVER_TAG, "value": "dagster", "limit": 10},
    ]
    assert bounds_engine_runs(config(**defaults))


def test_what_an_operator_has_set_stays():
    chosen = {"max_concurrent_runs": 4}
    assert with_defaults(chosen) == chosen
    limit = {"key": DRIVER_TAG, "value": "dagster", "limit": 2}
    assert with_defaults({"tag_concurrency_limits": [limit]})["tag_concurrency_limits"] == [limit]


@pytest.mark.parametrize(
    ("queue", "bounded"),
    [
        ({}, False),
        ({"max_concurrent_runs": 50}, True),
        ({"tag_concurrency_limits": [{"key": "team", "limit": 1}]}, False),
        ({"tag_concurrency_limits": [{"key": DRIVER_TAG, "limit": 5}]}, True),
        (
            {"tag_concurrency_limits": [{"key": DRIVER_TAG, "value": "conductor", "limit": 5}]},
            False,
        ),
    ],
)
def test_it_is_known_whether_processes_are_bounded(queue: dict[str, Any], bounded: bool):
    assert bounds_engine_runs(config(**queue)) is bounded
