"""A driven run that people and daemons reach for: deleted, forced to an end, monitored, terminated twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterRun, DagsterRunStatus
from dagster._daemon.monitoring.run_monitoring import execute_run_monitoring_iteration
from sqlalchemy.exc import OperationalError

from tests.integration.plugin.driver.yamls import CHAIN
from tests.support.conductor import ConductorSide
from tests.support.dagster_side import Ask, Code, log
from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.sim_worker import Play
from valohai_agent.protocol import utcnow
from valohai_dagster.errors import ConfigurationError
from valohai_dagster.plugin.compat import ResumeRunContext, WorkerStatus
from valohai_dagster.plugin.driver import driver as driver_module
from valohai_dagster.plugin.driver.events import RunEvents
from valohai_dagster.plugin.driver.lanes import Lanes, _Writing
from valohai_dagster.plugin.step_tag import DAGSTER_ENGINE, ENGINE_TAG
from valohai_dagster.records import tables as t

Sides = Callable[..., Any]


@pytest.fixture
def sides(tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Sides:
    """A conductor side whose driver looks after its runs every moment instead of every few seconds."""
    monkeypatch.setattr(driver_module, "STATUS_SECONDS", 0.2)

    @contextmanager
    def make(**options: Any) -> Iterator[ConductorSide]:
        code = Code.write(tmp_path / "code", CHAIN)
        plays = {"prep": Play.endless()}
        with ConductorSide(tmp_path / "side", code, plays, redis_server, **options) as side:
            yield side

    return make


def begun(side: ConductorSide) -> DagsterRun:
    run = side.create(Ask(assets=["prep"]))
    side.launch(run)
    side.wait_for_event(run.run_id, "STEP_START", "digits__prep")
    found = side.instance.get_run_by_id(run.run_id)
    assert found is not None
    return found


def execution(side: ConductorSide, run: DagsterRun) -> Any:
    with side.service.records.read() as conn:
        return conn.execute(t.executions.select().where(t.executions.c.run_id == run.run_id)).one()


def kinds(side: ConductorSide, run: DagsterRun) -> list[str]:
    records = side.instance.get_records_for_run(run.run_id).records
    events = [record.event_log_entry.dagster_event for record in records]
    return [event.event_type_value for event in events if event is not None]


def test_deleting_a_run_stops_its_execution(sides: Sides) -> None:
    with sides() as side:
        run = begun(side)
        side.instance.delete_run(run.run_id)
        wait_for(
            lambda: execution(side, run).status == "stopped", seconds=30, what="the execution's end"
        )
        assert "was deleted" in execution(side, run).reason
        assert side.instance.get_run_by_id(run.run_id) is None


def test_a_run_that_is_forced_to_its_end_stops_and_stays_as_it_was_marked(sides: Sides) -> None:
    """What the dialog's "force termination immediately" does (DAGSTER_NOTES 7)."""
    with sides() as side:
        run = begun(side)
        side.instance.report_run_canceled(run)
        wait_for(
            lambda: execution(side, run).status == "stopped", seconds=30, what="the execution's end"
        )
        wait_for(
            lambda: kinds(side, run)[-1] == "ENGINE_EVENT",
            seconds=30,
            what="the driver's last word",
        )
        assert kinds(side, run).count("PIPELINE_CANCELED") == 1
        found = side.instance.get_run_by_id(run.run_id)
        assert found is not None
        assert found.status is DagsterRunStatus.CANCELED


def test_a_terminate_that_nobody_told_of_is_seen_in_the_status(sides: Sides) -> None:
    with sides() as side:
        run = begun(side)
        side.instance.report_run_canceling(run)
        assert side.ended(run.run_id).status is DagsterRunStatus.CANCELED


def test_a_second_terminate_is_a_hard_stop(sides: Sides) -> None:
    """L-20, K-54."""
    with sides() as side:
        heard = threading.Event()
        side.worker.plays["prep"] = Play(until=heard)
        run = begun(side)
        side.terminate(run.run_id)
        side.terminate(run.run_id)

        def commands() -> list[str]:
            return [command.kind for command in side.worker.agent.commands()]

        wait_for(lambda: "stop-hard" in commands(), seconds=30, what="the hard stop")
        assert commands().count("stop") == 1
        heard.set()
        assert side.ended(run.run_id).status is DagsterRunStatus.CANCELED


def test_run_monitoring_with_dagsters_defaults_leaves_a_waiting_run_alone(sides: Sides) -> None:
    """DAGSTER_NOTES 8: neither a start time-out nor a health check ends a run that waits."""
    with sides(run_monitoring={"enabled": True, "start_timeout_seconds": 1}) as side:
        run = begun(side)
        time.sleep(1.1)  # longer than the time-out
        errors = [e for e in execute_run_monitoring_iteration(side.context, log) if e]
        assert not errors
        found = side.instance.get_run_by_id(run.run_id)
        assert found is not None
        assert found.status is DagsterRunStatus.STARTED


def test_a_conductor_that_is_away_does_not_make_a_run_unhealthy(sides: Sides) -> None:
    """ "Cannot reach" is not "failed" (ARCHITECTURE 5)."""
    with sides() as side:
        run = begun(side)
        side.service.kill()
        health = side.instance.run_launcher.check_run_worker_health(run)
        assert health.status is WorkerStatus.RUNNING
        told = side.instance.run_launcher.get_run_worker_debug_info(run)
        assert told
        assert "prep" in told
        side.service.start()
        side.terminate(run.run_id)
        assert side.ended(run.run_id).status is DagsterRunStatus.CANCELED


def test_handing_a_run_over_twice_runs_it_once(sides: Sides) -> None:
    """DAGSTER_NOTES 10: the dequeuer may launch twice."""
    with sides() as side:
        side.worker.plays["prep"] = Play()
        run = side.create(Ask(assets=["prep"]))
        side.launch(run)
        side.instance.run_launcher.launch_run(
            launch_context(side, side.instance.get_run_by_id(run.run_id))
        )
        assert side.ended(run.run_id).status is DagsterRunStatus.SUCCESS
        assert kinds(side, run).count("PIPELINE_START") == 1
        assert kinds(side, run).count("ASSET_MATERIALIZATION") == 1


def launch_context(side: ConductorSide, run: DagsterRun | None) -> Any:
    from valohai_dagster.plugin.compat import LaunchRunContext

    assert run is not None
    return LaunchRunContext(dagster_run=run, workspace=side.request())


def test_resuming_a_run_changes_nothing(sides: Sides) -> None:
    with sides() as side:
        run = begun(side)
        side.instance.resume_run(run.run_id, side.request(), attempt_number=1)
        side.terminate(run.run_id)
        assert side.ended(run.run_id).status is DagsterRunStatus.CANCELED
        assert kinds(side, run).count("STEP_START") == 1


def test_a_deleted_instance_ends_the_run_and_leaves_the_execution(sides: Sides) -> None:
    """`dagster dev` without a home takes its directory with it (DAGSTER_NOTES 13)."""
    with sides() as side:
        go_on = threading.Event()
        side.worker.plays["prep"] = Play(until=go_on)
        run = begun(side)
        history = side.root / "dagster" / "history"
        history.rename(history.with_name("elsewhere"))
        go_on.set()
        wait_for(lambda: reason(side, run), seconds=30, what="the driver to notice")
        history.with_name("elsewhere").rename(history)
        assert "instance is gone" in reason(side, run)
        wait_for(lambda: execution(side, run).status == "complete", what="the execution's end")


def reason(side: ConductorSide, run: DagsterRun) -> str:
    with side.service.records.read() as conn:
        query = t.runs.select().where(t.runs.c.run_id == run.run_id)
        return conn.execute(query).one().reason or ""


def test_a_run_cancelled_while_it_is_launched_ends_as_cancelled(sides: Sides) -> None:
    """RUN_START is not written over RUN_CANCELING, whose status it would replace (DAGSTER_NOTES 7)."""
    with sides() as side:
        run = side.create(Ask(assets=["prep"]))
        side.service.kill()
        side.launch(run)
        side.terminate(run.run_id)
        side.service.start()
        assert side.ended(run.run_id).status is DagsterRunStatus.CANCELED


def test_a_hand_over_of_a_newer_release_holds_up_nobody(sides: Sides) -> None:
    with sides() as side:
        side.worker.plays["prep"] = Play()
        side.service.kill()
        with side.service.records.write() as conn:
            for shard in range(side.service.records.shards):
                row = {"run_id": f"new-{shard}", "instance_id": "x", "shard": shard}
                conn.execute(
                    t.runs.insert().values(
                        **row, handover={"v": 9}, state="driving", ctime=utcnow()
                    )
                )
        side.service.start()
        assert side.run(Ask(assets=["prep"])).is_success


def test_runs_of_dagsters_engine_do_not_trouble_monitoring(sides: Sides) -> None:
    with sides() as side:
        run = side.create(Ask(assets=["prep"], tags={ENGINE_TAG: DAGSTER_ENGINE}))
        launcher = side.instance.run_launcher
        assert launcher.check_run_worker_health(run).status is WorkerStatus.RUNNING
        with pytest.raises(ConfigurationError, match="cannot resume"):
            launcher.resume_run(ResumeRunContext(run, side.request(), 1))


def test_a_full_mailbox_of_events_is_found_again_after_an_outage(sides: Sides) -> None:
    """The batch was stored, and the answer of the database got lost."""
    with sides() as side:
        run = side.create(Ask(assets=["prep"]))
        events = RunEvents(run.job_name, run.run_id)
        batch = [entry for n in range(40) for entry in events.engine(f"line {n}")]
        writing = _Writing(Lanes(), side.instance, batch, lambda: True)
        store, calls = writing._store, list[int]()

        def store_and_lose_the_answer(batch: list[Any]) -> None:
            store(batch)
            calls.append(len(batch))
            if len(calls) == 1:
                raise OperationalError("", {}, Exception("connection lost"))

        writing._store = store_and_lose_the_answer
        with pytest.raises(OperationalError):
            writing()
        writing()
        assert kinds(side, run).count("ENGINE_EVENT") == 40
