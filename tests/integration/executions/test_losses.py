"""Lost workers, lost Redis, lost service: nothing is lost with them and nothing happens twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service, static_settings
from tests.support.sim_agent import SimLease
from valohai_agent import protocol as p
from valohai_dagster.data.datums import list_datums
from valohai_dagster.data.trace import trace
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView
from valohai_dagster.executions.views import origins_of
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings


@pytest.fixture
def service(settings: Settings) -> Iterator[RunningService]:
    with running_service(static_settings(settings, lost_grace_seconds=1.0)) as service:
        yield service


def wait_until(condition: Callable[[], bool], timeout: float = 15.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def running(service: RunningService, server: RedisServer, name: str = "sim-1") -> SimLease:
    service.client.submit(make_spec())
    lease = service.agent(server, name).take()
    lease.leased()
    lease.wait_grants()
    return lease


def lose_lease(service: RunningService, server: RedisServer, lease: SimLease) -> None:
    """What the server does by itself thirty seconds after the last renewal."""
    with server.client() as client:
        client.delete(service.keys.lease("local", lease.job.execution_id))


def final_view(service: RunningService, execution_id: str) -> ExecutionView:
    return ExecutionView.model_validate(service.final(execution_id, timeout=30).data)


def test_a_silent_worker_is_suspected_first_and_said_so(
    service: RunningService, redis_server: RedisServer
):
    lease = running(service, redis_server)
    lose_lease(service, redis_server, lease)
    events = service.events(lease.job.execution_id, lambda e: e.kind is EventKind.warning)
    assert "no sign of life from worker sim-1" in events[-1].message


def test_one_death_that_is_told_twice_costs_one_attempt_of_each_execution(
    service: RunningService, redis_server: RedisServer
) -> None:
    agent = service.agent(redis_server, "sim-1")
    leases = []
    for _ in range(2):
        service.client.submit(make_spec())
        leases.append(lease := agent.take())
        lease.leased()
        lease.wait_grants()
    service.call(*[lambda s: s.worker_gone("local", "sim-1", "killed")] * 2)
    service.call(lambda s: s.worker_gone("local", "sim-1", "killed"))
    for lease in leases:
        view = service.client.view(lease.job.execution_id)
        assert view is not None
        assert view.attempt == 2


def test_a_worker_that_comes_back_within_the_grace_goes_on(
    settings: Settings, redis_server: RedisServer
):
    with running_service(static_settings(settings, lost_grace_seconds=600.0)) as service:
        lease = running(service, redis_server)
        lose_lease(service, redis_server, lease)
        service.events(lease.job.execution_id, lambda e: e.kind is EventKind.warning)
        assert lease.renew() == "restored"
        service.events(lease.job.execution_id, lambda e: "is back" in e.message)
        lease.finish()
        view = final_view(service, lease.job.execution_id)
    assert (view.status, view.attempt) == (ExecutionStatus.complete, 1)


def test_after_the_grace_another_worker_runs_attempt_two_and_the_old_one_is_fenced(
    service: RunningService, redis_server: RedisServer
):
    first = running(service, redis_server)
    lose_lease(service, redis_server, first)
    second = service.agent(redis_server, "sim-2").take(timeout=15)
    assert second.attempt == second.job.attempt == 2
    assert first.renew() == "lost"
    second.leased()
    second.wait_grants()
    first.report(p.MetadataEvents(events=[{"from": "the fenced one"}]))
    first.finish(p.Outcome.error, reason="too late")
    second.finish()
    view = final_view(service, first.job.execution_id)
    assert view.status is ExecutionStatus.complete
    assert view.latest_metadata == {}
    assert [a.end for a in view.attempts] == ["lost", "finished"]


def test_what_a_lost_attempt_had_stored_and_measured_is_not_told_beside_the_next_one(
    service: RunningService, redis_server: RedisServer
) -> None:
    first = running(service, redis_server)
    superseded = first.store("model.bin", b"one")
    first.report(p.MetadataEvents(events=[{"epoch": 1, "only": "the first"}]))
    service.events(first.job.execution_id, lambda e: e.kind is EventKind.metadata)
    lose_lease(service, redis_server, first)
    second = service.agent(redis_server, "sim-2").take(timeout=15)
    second.leased()
    second.wait_grants()
    stored = second.store("model.bin", b"two")
    second.report(p.MetadataEvents(events=[{"epoch": 7}]))
    second.finish()
    view = final_view(service, first.job.execution_id)
    assert [output.id for output in view.outputs] == [stored]
    assert view.latest_metadata == {"epoch": 7}
    with service.records.read() as conn:
        kept = conn.execute(sa.select(t.datums).where(t.datums.c.id == superseded)).one()
        assert kept.name == "model.bin", "somebody may use it already"
        assert (kept.execution_id, kept.withdrawn) == (view.id, True)
        assert [d.id for d in list_datums(conn, execution_ids=[view.id])] == [stored]
        assert set(origins_of(conn, [stored, superseded])) == {stored}
        graph = trace(conn, [f"file:{superseded}"], down=False)
        assert f"execution:{view.id}" in graph.nodes, "it is known what made it"
        assert graph.nodes[f"file:{superseded}"].facts["of_lost_attempt"]


def test_a_requeued_execution_goes_before_everything_that_waits(
    service: RunningService, redis_server: RedisServer
):
    lost = running(service, redis_server)
    for _ in range(3):
        service.client.submit(make_spec())
    with redis_server.client() as client:
        wait_until(lambda: client.zcard(service.keys.ready("local")) == 3)
        lose_lease(service, redis_server, lost)
        wait_until(lambda: client.zcard(service.keys.ready("local")) == 4)
    assert service.agent(redis_server, "sim-2").take().job.execution_id == lost.job.execution_id


def test_the_log_of_a_lost_attempt_is_kept(service: RunningService, redis_server: RedisServer):
    lease = running(service, redis_server)
    execution_id = lease.job.execution_id
    with redis_server.client() as client:
        for stream, text in (
            ("status", "starting container..."),
            ("stdout", "epoch 1"),
            ("stderr", "careful"),
        ):
            entry = {
                "s": stream,
                "t": "2026-01-01T00:00:00.000000",
                "m": text,
                "o": "0",
                "e": "0",
                "g": "0",
            }
            client.xadd(service.keys.log("local", execution_id, 1), entry)  # type: ignore[arg-type]
    lose_lease(service, redis_server, lease)
    service.agent(redis_server, "sim-2").take(timeout=15)
    with service.records.read() as conn:
        mine = sa.and_(t.attempts.c.execution_id == execution_id, t.attempts.c.number == 1)
        logs = conn.execute(sa.select(t.attempts.c.logs).where(mine)).scalar_one()
    assert service.service is not None
    store = service.service.stores["local"]
    with store.open(logs["stdout"]["key"]) as file:
        assert file.read() == b"epoch 1\n"
    with store.open(logs["stderr"]["key"]) as file:
        assert file.read() == b"[valohai] starting container...\ncareful\n"


def test_an_execution_that_loses_its_workers_again_and_again_is_given_up_with_the_reasons(
    settings: Settings, redis_server: RedisServer
):
    values = {"lost_grace_seconds": 0.0, "max_infrastructure_attempts": 2}
    with running_service(static_settings(settings, **values)) as service:
        lease = running(service, redis_server)
        lose_lease(service, redis_server, lease)
        again = service.agent(redis_server, "sim-2").take(timeout=15)
        again.leased()
        again.wait_grants()
        lose_lease(service, redis_server, again)
        view = final_view(service, lease.job.execution_id)
    assert view.status is ExecutionStatus.crashed
    assert "lost 2 times" in str(view.reason)
    assert "sim-1" in str(view.reason)
    assert "sim-2" in str(view.reason)


def test_a_job_that_was_taken_by_a_worker_that_died_before_its_first_word_is_queued_again(
    service: RunningService, redis_server: RedisServer
):
    service.client.submit(make_spec())
    mute = service.agent(redis_server).take()
    lose_lease(service, redis_server, mute)
    again = service.agent(redis_server, "sim-2").take(timeout=15)
    assert (again.job.execution_id, again.attempt) == (mute.job.execution_id, 2)


def test_an_execution_that_was_written_but_not_queued_is_queued_as_the_same_attempt(
    service: RunningService, redis_server: RedisServer
):
    """A conductor died between the two."""
    spec = make_spec()
    service.client.submit(spec)
    service.events(spec.execution_id, lambda e: e.kind is EventKind.snapshot)
    with redis_server.client() as client:
        client.zrem(service.keys.ready("local"), spec.execution_id)
        client.delete(service.keys.job("local", spec.execution_id), service.keys.bell("local"))
    lease = service.agent(redis_server).take(timeout=15)
    assert (lease.job.execution_id, lease.attempt) == (spec.execution_id, 1)


def test_redis_restarted_empty_loses_neither_what_waits_nor_what_runs(
    settings: Settings, own_redis: RedisServer
):
    with running_service(static_settings(settings, redis_url=own_redis.unix_url)) as service:
        lease = running(service, own_redis)
        waiting = make_spec()
        service.client.submit(waiting)
        service.events(waiting.execution_id, lambda e: e.kind is EventKind.snapshot)
        own_redis.restart(empty=True, pause_seconds=1.0)
        agent = service.agent
        wait_until(lambda: _functions_loaded(own_redis), timeout=20)
        assert lease.renew() == "restored"
        other = agent(own_redis, "sim-2").take(timeout=15)
        assert other.job.execution_id == waiting.execution_id
        lease.finish()
        service.client.submit(
            make_spec(execution_id=lease.job.execution_id)
        )  # a follower asks again
        view = final_view(service, lease.job.execution_id)
    assert (view.status, view.attempt) == (ExecutionStatus.complete, 1)


def _functions_loaded(server: RedisServer) -> bool:
    with server.client() as client:
        return bool(client.function_list(library="valohai_v1"))


def test_redis_restarted_with_its_data_loses_nothing(settings: Settings, own_redis: RedisServer):
    with running_service(static_settings(settings, redis_url=own_redis.unix_url)) as service:
        lease = running(service, own_redis)
        lease.report(p.MetadataEvents(events=[{"a": 1}]))
        time.sleep(1.2)  # append-only data is synced every second
        own_redis.restart()
        lease.finish()
        view = final_view(service, lease.job.execution_id)
    assert view.status is ExecutionStatus.complete
    assert view.latest_metadata["a"] == 1
