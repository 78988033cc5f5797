"""`ValohaiRunCoordinator` on a real instance with Dagster's own queue daemon."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import dagster as dg
import pytest
import yaml
from dagster import DagsterRunStatus as Status

from tests.support.redis_server import RedisServer
from tests.support.run_queue import LOCATION, NotingLauncher, RunQueue
from valohai_dagster.cli.checks import queue_findings
from valohai_dagster.plugin.coordinator import ValohaiRunCoordinator
from valohai_dagster.plugin.launch_claims import LaunchClaims
from valohai_dagster.plugin.queue_rules import DRIVER_TAG, bounds_engine_runs

ROOT = Path(__file__).parents[3]


class Open(Protocol):
    def __call__(self, **options: Any) -> AbstractContextManager[RunQueue]: ...


@pytest.fixture
def open_queue(tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Open:
    monkeypatch.setenv("VALOHAI_REDIS_URL", redis_server.unix_url)
    return lambda **options: RunQueue.open(tmp_path, **options)


@pytest.fixture
def queue(open_queue: Open) -> Iterator[RunQueue]:
    with open_queue() as found:
        yield found


# -- who waits and who does not ---------------------------------------------------------------------------------


def test_a_run_of_ours_starts_in_the_call_that_submits_it(queue: RunQueue) -> None:
    run = queue.launch("ours")
    assert queue.launched == [run.run_id]
    assert run.status is Status.STARTING
    assert queue.events(run) == ["PIPELINE_STARTING"]
    assert DRIVER_TAG not in run.tags
    assert queue.daemon_tick() == []


def test_a_pool_of_op_granularity_is_waited_for_by_the_step(queue: RunQueue) -> None:
    queue.instance.event_log_storage.set_concurrency_slots("gpu", 1)
    runs = [queue.launch("pooled") for _ in range(3)]
    assert queue.launched == [run.run_id for run in runs]


def test_other_runs_are_queued_and_marked_and_launched_by_the_daemon(queue: RunQueue) -> None:
    runs = [
        queue.launch("plain"),
        queue.launch("ours", "plain"),
        queue.launch(job="hooked"),
        queue.launch("ours", **{"valohai/engine": "dagster"}),
        queue.launch("ours", config={"loggers": {"console": {}}}),
    ]
    *others, ours = runs
    assert [run.status for run in others] == [Status.QUEUED] * 4
    assert all(run.tags[DRIVER_TAG] == "dagster" for run in others)
    assert queue.launched == [ours.run_id]
    assert queue.daemon_tick() == [run.run_id for run in others]


def test_without_our_launcher_every_run_is_queued(open_queue: Open) -> None:
    sync = {
        "module": "dagster._core.launcher.sync_in_memory_run_launcher",
        "class": "SyncInMemoryRunLauncher",
    }
    with open_queue(launcher=sync) as queue:
        assert queue.launch("ours").status is Status.QUEUED


# -- limits hold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"coordinator": {"max_concurrent_runs": 1}},
        {"concurrency": {"runs": {"max_concurrent_runs": 1}}},
    ],
)
def test_a_limit_of_runs_holds_for_ours(open_queue: Open, options: dict[str, Any]) -> None:
    with open_queue(**options) as queue:
        runs = [queue.launch("ours") for _ in range(3)]
        assert [run.status for run in runs] == [Status.QUEUED] * 3
        for run in runs:
            assert queue.daemon_tick() == [run.run_id]
            assert queue.daemon_tick() == []
            queue.end(run)


def test_a_limit_of_zero_stops_all_runs(open_queue: Open) -> None:
    with open_queue(coordinator={"max_concurrent_runs": 0}) as queue:
        assert queue.launch("ours").status is Status.QUEUED
        assert queue.daemon_tick() == []


def test_a_limit_on_a_tag_holds_for_those_who_carry_it(open_queue: Open) -> None:
    limit = {"key": "team", "value": {"applyLimitPerUniqueValue": True}, "limit": 1}
    with open_queue(coordinator={"tag_concurrency_limits": [limit]}) as queue:
        first, second, other = (queue.launch("ours", team=team) for team in ("a", "a", "b"))
        free = queue.launch("ours")
        assert queue.launched == [free.run_id]
        assert queue.daemon_tick() == [first.run_id, other.run_id]
        queue.end(first)
        assert queue.daemon_tick() == [second.run_id]


def test_a_pool_of_run_granularity_holds(open_queue: Open) -> None:
    with open_queue(concurrency={"pools": {"granularity": "run"}}) as queue:
        queue.instance.event_log_storage.set_concurrency_slots("gpu", 1)
        first, second = queue.launch("pooled"), queue.launch("pooled", "ours")
        free = queue.launch("ours")
        assert queue.launched == [free.run_id]
        assert queue.daemon_tick() == [first.run_id]
        assert queue.daemon_tick() == []
        queue.end(first)
        assert queue.daemon_tick() == [second.run_id]


def test_processes_of_dagsters_engine_stay_bounded_while_ours_are_not(open_queue: Open) -> None:
    limit = {"key": DRIVER_TAG, "value": "dagster", "limit": 2}
    with open_queue(coordinator={"tag_concurrency_limits": [limit]}) as queue:
        theirs = [queue.launch("plain") for _ in range(4)]
        ours = [queue.launch("ours") for _ in range(5)]
        assert queue.launched == [run.run_id for run in ours]
        assert queue.daemon_tick() == [run.run_id for run in theirs[:2]]
        assert queue.daemon_tick() == []


def test_without_configuration_ten_processes_are_the_limit(queue: RunQueue) -> None:
    for _ in range(12):
        queue.launch("plain")
    assert len(queue.daemon_tick()) == 10
    assert bounds_engine_runs(queue.instance.get_concurrency_config())


def test_a_mark_taken_over_from_a_parent_run_is_corrected(open_queue: Open) -> None:
    limit = {"key": DRIVER_TAG, "value": "dagster", "limit": 0}
    with open_queue(coordinator={"tag_concurrency_limits": [limit]}) as queue:
        again = queue.launch("ours", **{DRIVER_TAG: "dagster"})
        assert queue.launched == [again.run_id]
        assert again.tags[DRIVER_TAG] == "conductor"


def test_a_queue_that_waits_for_code_locations_gets_runs_of_those_that_are_away(
    open_queue: Open,
) -> None:
    with open_queue(coordinator={"max_user_code_failure_retries": 1}) as queue:
        assert queue.launch("ours").status is Status.STARTING
        run = queue.create("ours")
        with pytest.warns(UserWarning, match="Error loading repository location"):
            queue.context.reload_code_location(LOCATION)  # which locations in-process cannot do
        assert queue.submit(run).status is Status.QUEUED


def test_the_shipped_dagster_yaml_bounds_processes_alone(open_queue: Open) -> None:
    shipped = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    assert shipped["run_coordinator"]["class"] == ValohaiRunCoordinator.__name__
    with open_queue(coordinator=shipped["run_coordinator"]["config"]) as queue:
        config = queue.instance.get_concurrency_config()
        assert bounds_engine_runs(config)
        assert config.run_queue_config is not None
        assert config.run_queue_config.max_concurrent_runs == -1
        assert queue.launch("ours").status is Status.STARTING
        coordinator = queue.instance.run_coordinator
        assert isinstance(coordinator, ValohaiRunCoordinator)
        assert coordinator.dequeue_interval_seconds == 1


# -- races ------------------------------------------------------------------------------------------------------


def test_a_second_submit_changes_nothing(queue: RunQueue) -> None:
    run = queue.create("ours")
    queue.submit(run)
    assert queue.submit(run).status is Status.STARTING
    assert queue.events(run) == ["PIPELINE_STARTING"]


def test_submits_at_the_same_time_launch_once(queue: RunQueue) -> None:
    run = queue.create("ours")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: queue.submit(run).status, range(8)))
    assert set(answers) == {Status.STARTING}
    assert queue.events(run) == ["PIPELINE_STARTING"]
    assert queue.launched == [run.run_id]


def test_a_launch_whose_process_died_at_once_is_taken_over(
    queue: RunQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("valohai_dagster.plugin.launch_claims.CLAIM_SECONDS", 1)
    run = queue.create("ours")
    dead = LaunchClaims()
    assert dead.take(run.run_id)
    dead.close()
    queue.submit(run)
    assert queue.launched == [run.run_id]


def test_a_queued_run_is_never_launched_here(queue: RunQueue) -> None:
    run = queue.create("ours")
    queue.instance.report_dagster_event(
        dg.DagsterEvent(event_type_value="PIPELINE_ENQUEUED", job_name=run.job_name),
        run_id=run.run_id,
    )
    assert queue.submit(run).status is Status.QUEUED
    assert queue.launched == []
    assert queue.daemon_tick() == [run.run_id]


@pytest.mark.parametrize("how", ["cancelled", "deleted"])
def test_a_run_that_ends_before_its_launch_stays_ended(
    queue: RunQueue, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    run = queue.create("ours")
    take = LaunchClaims.take

    def take_late(claims: LaunchClaims, run_id: str) -> bool:
        if how == "cancelled":
            queue.instance.report_run_canceled(run)
        else:
            queue.instance.delete_run(run_id)
        return take(claims, run_id)

    monkeypatch.setattr(LaunchClaims, "take", take_late)
    queue.submit(run)
    assert queue.launched == []
    if how == "cancelled":
        assert queue.status(run) is Status.CANCELED


def test_a_launch_that_fails_fails_the_run_once(queue: RunQueue) -> None:
    def fail(run_id: str) -> None:
        raise ValueError("no room")

    NotingLauncher.during = fail
    run = queue.launch("ours")
    assert run.status is Status.FAILURE
    assert queue.events(run) == ["PIPELINE_STARTING", "ENGINE_EVENT", "PIPELINE_FAILURE"]


def test_without_redis_the_queue_takes_the_run(
    open_queue: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with open_queue() as queue:
        monkeypatch.setenv("VALOHAI_REDIS_URL", f"unix://{tmp_path}/nobody.sock")
        assert queue.launch("ours").status is Status.QUEUED


# -- the doctor -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"coordinator": {"max_concurrent_runs": 25}}, ["note: max_concurrent_runs is 25"]),
        (
            {"concurrency": {"runs": {"tag_concurrency_limits": [{"key": "a", "limit": 1}]}}},
            ["warn: nothing limits runs of Dagster's own engine"],
        ),
        (
            {
                "run_coordinator": {
                    "module": "dagster._core.run_coordinator",
                    "class": "QueuedRunCoordinator",
                },
                "launcher": {"module": "dagster", "class": "DefaultRunLauncher"},
            },
            ["warn: run_launcher is DefaultRunLauncher", "note: run_coordinator is Queued"],
        ),
    ],
)
def test_the_doctor_says_what_makes_runs_wait_or_costs_processes(
    open_queue: Open, options: dict[str, Any], expected: list[str]
) -> None:
    with open_queue(**options) as queue:
        found = [f"{f.level}: {f.text}" for f in queue_findings(queue.instance)]
    assert [text[: len(start)] for text, start in zip(found, expected, strict=True)] == expected
