"""Machines that are reclaimed: who continues, with what, and what everybody is told (L-30 to L-32)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.service import (
    RunningService,
    make_spec,
    running_service,
    shorten_leases,
    static_settings,
)
from tests.support.sim_agent import SimLease
from valohai_agent import protocol as p
from valohai_dagster.executions.restarts import Restarts
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings

WHAT = "AWS reclaims this spot machine (terminate)"
REASON = f"{WHAT}; the command was cut short, its outputs up to then are stored"


@pytest.fixture
def service(settings: Settings) -> Iterator[RunningService]:
    with running_service(static_settings(settings, lost_grace_seconds=600.0)) as service:
        yield service


def running(
    service: RunningService, server: RedisServer, name: str = "sim-1", **values: Any
) -> SimLease:
    service.client.submit(make_spec(**{"autorestart": True, **values}))
    return take(service, server, name)


def take(service: RunningService, server: RedisServer, name: str) -> SimLease:
    lease = service.agent(server, name).take(timeout=15)
    lease.leased()
    lease.wait_grants()
    return lease


def cut_short(lease: SimLease, *phases: str) -> None:
    """What an agent reports whose machine goes away."""
    now = datetime.now(timezone.utc)
    spans = [p.PhaseSpan(phase=phase, started_at=now, ended_at=now) for phase in phases]
    lease.report(p.Preempted(seconds_left=110.0, what=WHAT))
    lease.finish(p.Outcome.error, reason=REASON, exit_code=130, preempted=True, phases=spans)


def wait_for_queue(service: RunningService, server: RedisServer, length: int) -> None:
    with server.client() as client:
        ready = service.keys.ready("local")
        wait_for(lambda: client.zcard(ready) == length, seconds=20, what="the queue")


def view_of(service: RunningService, execution_id: str) -> ExecutionView:
    view = service.client.view(execution_id)
    assert view is not None
    return view


def final(service: RunningService, execution_id: str) -> ExecutionView:
    return ExecutionView.model_validate(service.final(execution_id, timeout=30).data)


def restart_files(job: p.Job) -> dict[str, str | None]:
    """Name and datum of what the execution begins with."""
    (found,) = (item for item in job.inputs if item.name == "_restart")
    return {file.name: file.datum_id for file in found.files}


def test_l30_another_execution_continues_with_all_outputs_before_everything_that_waits(
    service: RunningService, redis_server: RedisServer
) -> None:
    spec = make_spec(autorestart=True, title="night run", tags=["a"], parameters={"n": 3})
    service.client.submit(spec)
    first = take(service, redis_server, "sim-1")
    kept = {name: first.store(name, b"epoch 3") for name in ("model.bin", "logs/metrics.csv")}
    first.report(p.MetadataEvents(events=[{"epoch": 3}]))
    service.client.submit(make_spec())
    cut_short(first, "preparing", "running", "uploading")
    wait_for_queue(service, redis_server, 2)
    second = take(service, redis_server, "sim-2")
    assert (second.job.execution_id != first.job.execution_id, second.attempt) == (True, 1)
    assert second.job.parameters == {"n": 3}
    assert restart_files(second.job) == kept
    assert second.job.execution_config["valohai.execution-id"] == second.job.execution_id
    assert any("continues execution #1" in notice for notice in second.job.notices)
    stored = second.store("model.bin", b"epoch 9")
    second.finish()
    end = final(service, first.job.execution_id)
    assert (end.id, end.status) == (second.job.execution_id, ExecutionStatus.complete)
    assert (end.restart_of, end.restarts, end.attempt) == (first.job.execution_id, 1, 1)
    assert [output.id for output in end.outputs] == [stored]
    assert {i.datum_id for i in end.inputs if i.input == "_restart"} == set(kept.values())
    before = view_of(service, first.job.execution_id)
    assert (before.status, before.continued_by) == (ExecutionStatus.stopped, end.id)
    assert str(before.reason) == f"{REASON}; execution #{end.counter} continues it"
    assert {output.id for output in before.outputs} == set(kept.values()), "outputs are kept (L-33)"
    with service.records.read() as conn:
        rows = conn.execute(sa.select(t.executions).where(t.executions.c.run_id == spec.run_id))
        assert {(row.title, tuple(row.tags), row.step_key) for row in rows} == {
            ("night run", ("a",), spec.step_key)
        }


def test_l30_the_directory_does_not_exist_on_a_first_run(
    service: RunningService, redis_server: RedisServer
) -> None:
    lease = running(service, redis_server)
    assert lease.job.inputs == []


def test_l30_files_of_the_restart_can_be_fetched(
    service: RunningService, redis_server: RedisServer
) -> None:
    first = running(service, redis_server)
    first.store("checkpoint", b"state")
    cut_short(first, "running")
    second = service.agent(redis_server, "sim-2").take(timeout=15)
    second.leased()
    grants = second.wait_grants()
    (file,) = second.job.inputs[-1].files
    assert grants.inputs[file.id].url.startswith("file://")
    assert not grants.refused


def test_l32_inputs_are_the_same_files_whatever_their_names_lead_to_now(
    service: RunningService, redis_server: RedisServer
) -> None:
    maker = running(service, redis_server)
    datum = maker.store("data.csv", b"1,2")
    maker.finish()
    final(service, maker.job.execution_id)
    inputs = [{"name": "data", "uris": [f"datum://{datum}"]}]
    first = running(service, redis_server, "sim-2", inputs=inputs)
    first.store("checkpoint", b"x")
    cut_short(first, "running")
    second = take(service, redis_server, "sim-3")
    assert second.job.inputs[0] == first.job.inputs[0]
    assert [item.name for item in second.job.inputs] == ["data", "_restart"]


def test_an_execution_that_is_interrupted_again_loses_nothing_of_what_was_stored_before(
    service: RunningService, redis_server: RedisServer
) -> None:
    first = running(service, redis_server)
    old, stays = first.store("model.bin", b"1"), first.store("first.txt", b"1")
    cut_short(first, "running")
    second = take(service, redis_server, "sim-2")
    new = second.store("model.bin", b"2")
    cut_short(second, "running")
    third = take(service, redis_server, "sim-3")
    assert restart_files(third.job) == {"model.bin": new, "first.txt": stays}
    assert old not in restart_files(third.job).values()
    third.finish()
    end = final(service, first.job.execution_id)
    assert (end.id, end.restarts) == (third.job.execution_id, 2)


def test_l31_without_autorestart_it_is_an_error_in_words(
    service: RunningService, redis_server: RedisServer
) -> None:
    lease = running(service, redis_server, autorestart=False)
    lease.store("model.bin", b"1")
    cut_short(lease, "running")
    view = final(service, lease.job.execution_id)
    assert (view.status, view.continued_by) == (ExecutionStatus.error, None)
    assert str(view.reason).startswith(f"{REASON}. With `autorestart: true`")
    assert len(view.outputs) == 1


def test_a_command_that_had_not_begun_is_another_attempt_of_the_same_execution(
    service: RunningService, redis_server: RedisServer
) -> None:
    lease = running(service, redis_server, autorestart=False)
    service.client.submit(make_spec())
    cut_short(lease, "preparing", "pulling")
    wait_for_queue(service, redis_server, 2)
    again = take(service, redis_server, "sim-2")
    assert (again.job.execution_id, again.attempt) == (lease.job.execution_id, 2)
    again.finish()
    view = final(service, lease.job.execution_id)
    assert (view.status, view.exit_code) == (ExecutionStatus.complete, None)
    assert [a.end for a in view.attempts] == ["preempted", "finished"]


def test_a_machine_that_goes_before_its_agent_is_done_is_continued_from_what_is_stored(
    service: RunningService, redis_server: RedisServer
) -> None:
    lease = running(service, redis_server)
    live = lease.store("checkpoint-1", b"1")
    lease.report(p.Preempted(seconds_left=110.0, what=WHAT))
    service.events(lease.job.execution_id, lambda e: WHAT in e.message)
    service.call(lambda s: s.worker_gone("local", "sim-1", "its machine is gone"))
    second = take(service, redis_server, "sim-2")
    assert second.job.execution_id != lease.job.execution_id
    assert restart_files(second.job) == {"checkpoint-1": live}
    before = view_of(service, lease.job.execution_id)
    assert "was reclaimed before the command ended: its machine is gone" in str(before.reason)
    assert [a.end for a in before.attempts] == ["preempted"]
    lease.finish()  # too late
    second.finish()
    end = final(service, lease.job.execution_id)
    assert (end.id, end.status) == (second.job.execution_id, ExecutionStatus.complete)
    assert view_of(service, lease.job.execution_id).status is ExecutionStatus.stopped


def test_who_is_silent_after_the_time_that_was_left_is_gone_without_any_grace(
    service: RunningService, redis_server: RedisServer
) -> None:
    """The grace of this service is ten minutes."""
    lease = running(service, redis_server)
    lease.report(p.Preempted(seconds_left=0.0, what=WHAT))
    service.events(lease.job.execution_id, lambda e: WHAT in e.message)
    with redis_server.client() as client:
        client.delete(service.keys.lease("local", lease.job.execution_id))
    assert restart_files(take(service, redis_server, "sim-2").job) == {}


def test_who_is_silent_after_its_notice_was_taken_back_has_the_grace(
    service: RunningService, redis_server: RedisServer
) -> None:
    lease = running(service, redis_server)
    execution_id = lease.job.execution_id
    lease.report(p.Preempted(seconds_left=0.0, what=WHAT))
    lease.report(p.Preempted(withdrawn=True))
    service.events(execution_id, lambda e: "stays after all" in e.message)
    with redis_server.client() as client:
        client.delete(service.keys.lease("local", execution_id))
    service.events(execution_id, lambda e: "it may still be computing" in e.message)
    lease.finish()
    assert final(service, execution_id).status is ExecutionStatus.complete


def test_a_machine_that_goes_without_a_notice_costs_an_attempt_and_no_restart(
    service: RunningService, redis_server: RedisServer
) -> None:
    lease = running(service, redis_server)
    service.call(lambda s: s.worker_gone("local", "sim-1", "terminated"))
    again = take(service, redis_server, "sim-2")
    assert (again.job.execution_id, again.attempt) == (lease.job.execution_id, 2)


def test_a_stop_of_the_interrupted_execution_reaches_the_one_that_continues_it(
    service: RunningService, redis_server: RedisServer
) -> None:
    first = running(service, redis_server)
    cut_short(first, "running")
    second = take(service, redis_server, "sim-2")
    service.client.stop(first.job.execution_id, reason="enough")
    service.events(second.job.execution_id, lambda e: "stop sent to worker sim-2" in e.message)
    second.finish(p.Outcome.stopped)
    view = final(service, first.job.execution_id)
    assert (view.status, view.reason) == (ExecutionStatus.stopped, "enough")


def test_a_stop_that_was_asked_for_before_the_machine_goes_is_no_reason_to_go_on(
    service: RunningService, redis_server: RedisServer
) -> None:
    lease = running(service, redis_server)
    service.client.stop(lease.job.execution_id, reason="enough")
    service.events(lease.job.execution_id, lambda e: "stop sent" in e.message)
    cut_short(lease, "running")
    view = final(service, lease.job.execution_id)
    assert (view.status, view.continued_by) == (ExecutionStatus.stopped, None)


def test_followers_are_told_of_the_notice_the_end_and_the_next_execution(
    service: RunningService, redis_server: RedisServer
) -> None:
    first = running(service, redis_server)
    cut_short(first, "running")
    second = take(service, redis_server, "sim-2")
    second.finish()
    told = service.events(first.job.execution_id, lambda e: e.kind is EventKind.final)
    texts = [event.message for event in told]
    assert any(text.startswith(f"{WHAT}, 1") and "stores its outputs" in text for text in texts)
    assert any("execution #2 continues it" in text for text in texts)
    assert any(text.startswith("continues execution #1") for text in texts)
    assert [e.kind for e in told].count(EventKind.final) == 1


def test_l32_a_crash_between_writing_and_queueing_loses_no_restart(
    settings: Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_leases(monkeypatch)
    reached: list[None] = []

    async def hang(self: Restarts, outbox: Any) -> None:
        if outbox.front:
            reached.append(None)
            await asyncio.sleep(3600)

    with running_service(static_settings(settings)) as service:
        first = running(service, redis_server)
        waiting: ExecutionSpec = make_spec()
        service.client.submit(waiting)
        with monkeypatch.context() as patch:
            patch.setattr(Restarts, "queue", hang)
            cut_short(first, "running")
            service.events(first.job.execution_id, lambda e: "continues it" in e.message)
            service.kill()
        assert reached
        service.start()
        (new,) = _restarted(service, first.job.execution_id)
        wait_for_queue(service, redis_server, 2)
        second = take(service, redis_server, "sim-2")
        assert second.job.execution_id == new, "before what waits"
        second.finish()
        assert final(service, first.job.execution_id).id == new
        assert _restarted(service, first.job.execution_id) == [new]


def _restarted(service: RunningService, execution_id: str) -> list[str]:
    query = sa.select(t.executions.c.id).where(t.executions.c.restart_of == execution_id)
    with service.records.read() as conn:
        return list(conn.execute(query).scalars())
