"""What `why` says of runs: in Dagster's queue, in progress step by step, and ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import dagster as dg
import pytest
from dagster import DagsterRun
from dagster._daemon.types import DaemonHeartbeat

from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.run_queue import RunQueue
from tests.support.service import RunningService, make_spec, running_service, static_settings
from valohai_agent.protocol import utcnow
from valohai_dagster.broker.connection import connect
from valohai_dagster.executions.why import Explanation
from valohai_dagster.executions.why_reader import Sources
from valohai_dagster.plugin.compat import engine as compat
from valohai_dagster.plugin.why_queue import DAEMON
from valohai_dagster.plugin.why_run import RunExplanation, why_run
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings

ERROR = compat.SerializableErrorInfo(message="x", stack=[], cls_name=None)


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


@pytest.fixture
def service(settings: Settings) -> Iterator[RunningService]:
    with running_service(static_settings(settings)) as service:
        yield service


@pytest.fixture
def sources(service: RunningService) -> Iterator[Sources]:
    client = connect(service.settings)
    yield Sources(
        records=service.records, broker=client, keys=service.keys, settings=service.settings
    )
    client.close()


def why(queue: RunQueue, run: DagsterRun, sources: Sources | None = None) -> RunExplanation:
    return why_run(queue.instance, queue.reload(run), sources)


def beat(queue: RunQueue) -> None:
    now = datetime.now(timezone.utc).timestamp()
    heartbeat = DaemonHeartbeat(timestamp=now, daemon_type=DAEMON, daemon_id="d", errors=[])
    queue.instance.add_daemon_heartbeat(heartbeat)


def begin(queue: RunQueue, run: DagsterRun, sources: Sources) -> None:
    """What the launcher does: the row of the hand-over, then RUN_START."""
    row = {
        "run_id": run.run_id,
        "instance_id": "i",
        "shard": sources.records.shard_of(run.run_id),
        "handover": {},
        "state": "driving",
        "ctime": utcnow(),
    }
    with sources.records.write() as conn:
        conn.execute(t.runs.insert().values(**row))
    queue.instance.report_dagster_event(
        dg.DagsterEvent(event_type_value="PIPELINE_START", job_name=run.job_name), run.run_id
    )


def tell(queue: RunQueue, run: DagsterRun, kind: str, step: str, data: Any = None) -> None:
    event = dg.DagsterEvent(
        event_type_value=kind, job_name=run.job_name, step_key=step, event_specific_data=data
    )
    queue.instance.report_dagster_event(event, run.run_id)


def step(found: RunExplanation, name: str) -> Explanation:
    return next(one for one in found.steps if one.subject.startswith(f"step {name}"))


# -- in Dagster's queue -----------------------------------------------------------------------------------------


def test_without_a_daemon_nobody_looks_at_the_queue(queue: RunQueue) -> None:
    found = why(queue, queue.launch("plain")).run
    assert found.state == "no-daemon"
    assert "no dagster-daemon has ever looked at it" in found.text
    assert "dagster-daemon run" in str(found.next_step)
    assert found.details == (
        "Dagster's own engine runs it: step plain is not a step of a valohai.yaml that this release can read",
    )


def test_the_limit_that_holds_it_is_named_with_the_runs_that_fill_it(open_queue: Open) -> None:
    with open_queue(coordinator={"max_concurrent_runs": 1}) as queue:
        first, second = queue.launch("ours"), queue.launch("ours")
        beat(queue)
        assert why(queue, first).run.state == "queued"
        queue.daemon_tick()
        found = why(queue, second).run
        assert found.text == (
            f"in Dagster's run queue: at most 1 run at once, and 1 is in progress ({first.run_id[:8]})"
        )
        assert found.subject == f"run {second.run_id[:8]}"


def test_a_full_pool_of_run_granularity_is_named(open_queue: Open) -> None:
    with open_queue(concurrency={"pools": {"granularity": "run"}}) as queue:
        queue.instance.event_log_storage.set_concurrency_slots("gpu", 1)
        _, second = queue.launch("pooled"), queue.launch("pooled")
        beat(queue)
        queue.daemon_tick()
        assert "at most 1 in pool gpu at once" in why(queue, second).run.text


# -- in progress ------------------------------------------------------------------------------------------------


def test_steps_wait_for_their_upstream_and_executions_for_workers(
    queue: RunQueue, service: RunningService, sources: Sources
) -> None:
    run = queue.launch("ours", "after")
    begin(queue, run, sources)
    spec = make_spec(run_id=run.run_id, step_key="ours")
    service.client.submit(spec)

    def look() -> RunExplanation | None:
        found = why(queue, run, sources)
        return found if step(found, "ours").state == "no-worker" else None

    found = wait_for(look, seconds=15, what="the execution in the queue")
    assert found is not None
    assert found.run.text == "2 of 2 steps left"
    assert step(found, "ours").subject == "step ours (digits#1 train)"
    assert step(found, "after").text == "waits for ours"
    assert [line.split(":")[0] for line in found.lines()] == [
        f"run {run.run_id[:8]}",
        "  step ours (digits#1 train)",
        "    next",
        "  step after",
    ]
    as_json = found.to_dict()
    assert (as_json["run"], as_json["steps"][0]["execution"]) == (run.run_id, spec.execution_id)


def test_a_retry_waits_until_its_time(queue: RunQueue, sources: Sources) -> None:
    run = queue.launch("ours")
    begin(queue, run, sources)
    data = compat.StepRetryData(error=ERROR, seconds_to_wait=600)
    tell(queue, run, "STEP_UP_FOR_RETRY", "ours", data)
    found = step(why(queue, run, sources), "ours")
    assert found.state == "retry"
    assert "the next one begins at" in found.text
    assert "(in 9 min)" in found.text


def test_a_step_waits_for_the_slot_of_its_pool(queue: RunQueue, sources: Sources) -> None:
    storage = queue.instance.event_log_storage
    storage.set_concurrency_slots("gpu", 1)
    storage.claim_concurrency_slot("gpu", "11111111-0000", "other")
    run = queue.launch("pooled")
    begin(queue, run, sources)
    found = step(why(queue, run, sources), "pooled")
    assert found.state == "pool"
    assert "pool gpu is full: 1 of 1 slot held by other of run 11111111" in found.text
    storage.free_concurrency_slots_for_run("11111111-0000")
    assert step(why(queue, run, sources), "pooled").text == "about to begin"


def test_a_run_that_no_conductor_got_or_drives(
    queue: RunQueue, service: RunningService, sources: Sources, redis_server: RedisServer
) -> None:
    run = queue.launch("ours")
    assert why(queue, run, sources).run.state == "not-handed-over"
    begin(queue, run, sources)
    assert why(queue, run, sources).run.text == "1 of 1 step left"
    service.kill()
    with redis_server.client() as client:  # as they expire
        client.delete(service.keys.service(), service.keys.conductors())
        client.delete(*(service.keys.shard(n) for n in range(service.records.shards)))
    found = why(queue, run, sources).run
    assert found.state == "no-conductor"
    assert "valohai-dagster conductor" in str(found.next_step)


def test_a_cancelled_run_tells_that_it_is_being_cancelled(
    queue: RunQueue, sources: Sources
) -> None:
    run = queue.launch("ours", "after")
    begin(queue, run, sources)
    tell(queue, run, "STEP_SUCCESS", "ours", compat.StepSuccessData(duration_ms=1.0))
    queue.instance.report_run_canceling(queue.reload(run))
    assert why(queue, run, sources).run.text == "is being cancelled, 1 of 2 steps left, 1 succeeded"


# -- ended ------------------------------------------------------------------------------------------------------


def test_an_ended_run_tells_how_and_which_step_failed(queue: RunQueue, sources: Sources) -> None:
    run = queue.launch("ours", "after")
    begin(queue, run, sources)
    data = compat.StepFailureData(error=ERROR, user_failure_data=None)
    tell(queue, run, "STEP_FAILURE", "ours", data)
    queue.instance.report_run_failed(queue.reload(run))
    found = why(queue, run, sources)
    assert found.run.text.startswith("failed after")
    assert [(one.subject, one.text) for one in found.steps] == [("step ours", "failed")]


def test_a_run_that_failed_before_its_steps_tells_why(queue: RunQueue) -> None:
    run = queue.launch("ours", "after")
    error = compat.SerializableErrorInfo(
        message="valohai_dagster.errors.ServiceUnavailable: the conductor ended. It said:\nno botocore\n",
        stack=[],
        cls_name="ServiceUnavailable",
    )
    queue.instance.report_engine_event(
        error.message, queue.reload(run), compat.EngineEventData.engine_error(error)
    )
    queue.instance.report_run_failed(queue.reload(run))
    found = why(queue, run)
    assert found.run.text.endswith(": the conductor ended. It said:")
    assert found.run.details == ("no botocore",)
    assert "doctor" in str(found.run.next_step)


def test_without_records_dagsters_facts_are_told(queue: RunQueue) -> None:
    run = queue.launch("ours", "after")
    found = why(queue, run)
    assert found.run.text == "is being launched, 2 of 2 steps left"
    assert step(found, "after").text == "waits for ours"


def test_a_run_that_was_never_submitted(queue: RunQueue) -> None:
    assert why(queue, queue.create("ours")).run.state == "not-submitted"
