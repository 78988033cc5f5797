"""What `why` says of an execution on its way through real records and a real Redis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service, static_settings
from tests.support.sim_agent import SimLease
from valohai_agent import protocol as p
from valohai_dagster.broker.connection import connect
from valohai_dagster.errors import NotFoundError
from valohai_dagster.executions.why import Explanation
from valohai_dagster.executions.why_reader import Sources, why_execution
from valohai_dagster.settings import Settings


@pytest.fixture
def service(settings: Settings) -> Iterator[RunningService]:
    with running_service(static_settings(settings, lost_grace_seconds=60.0)) as service:
        yield service


@pytest.fixture
def sources(service: RunningService) -> Iterator[Sources]:
    client = connect(service.settings)
    yield Sources(
        records=service.records, broker=client, keys=service.keys, settings=service.settings
    )
    client.close()


def submit(service: RunningService, sources: Sources) -> str:
    spec = make_spec()
    service.client.submit(spec)
    until(sources, spec.execution_id, lambda found: found.facts["ahead"] is not None)
    return spec.execution_id


def until(sources: Sources, execution_id: str, condition) -> Explanation:
    """The first explanation that the condition accepts."""

    def look() -> Explanation | None:
        try:
            found = why_execution(sources, execution_id)
        except NotFoundError:
            return None
        return found if condition(found) else None

    found = wait_for(look, seconds=15, what="the explanation")
    assert found is not None
    return found


def state(sources: Sources, execution_id: str, name: str) -> Explanation:
    return until(sources, execution_id, lambda found: found.state == name)


def running(service: RunningService, server: RedisServer) -> SimLease:
    service.client.submit(make_spec())
    agent = service.agent(server)
    lease = agent.take()
    agent.heartbeat(busy="1", state="busy")
    lease.leased()
    lease.wait_grants()
    return lease


def test_from_the_queue_to_its_end(
    service: RunningService, sources: Sources, redis_server: RedisServer
) -> None:
    waiting = submit(service, sources)
    assert "no worker of group local has checked in" in str(why_execution(sources, waiting))
    agent = service.agent(redis_server)
    lease = agent.take()
    assert why_execution(sources, waiting).state == "taken"
    lease.leased()
    found = state(sources, waiting, "leased")
    assert "leased by worker sim-1 on host sim since" in found.text
    lease.report(p.PhaseChanged(phase=p.Phase.pulling))
    lease.report(p.PhaseChanged(phase=p.Phase.pulling, message="pulling 63 %", done=63, total=100))
    found = until(sources, waiting, lambda found: "63" in found.text)
    assert found.text.startswith("pulling 63 % since ")
    assert (found.state, found.subject) == ("pulling", "digits#1 train")
    lease.finish(p.Outcome.error, reason="the command failed", exit_code=3)
    assert "failed after 0 s: the command failed" in state(sources, waiting, "error").text


def test_who_is_ahead_and_who_has_the_slot(
    service: RunningService, sources: Sources, redis_server: RedisServer
) -> None:
    running(service, redis_server)
    first, second = submit(service, sources), submit(service, sources)
    found = until(sources, second, lambda found: len(found.details) == 2)
    assert found.text == "queued behind 1 in group local: 1 of 1 slots busy on 1 worker"
    assert found.details == ("ahead: digits#2 train", "on the slots: digits#1 train on sim-1")
    assert why_execution(sources, first).text.startswith("first in the queue of group local")


def test_a_lost_lease_is_suspected(
    service: RunningService, sources: Sources, redis_server: RedisServer
) -> None:
    lease = running(service, redis_server)
    execution = lease.job.execution_id
    with redis_server.client() as client:
        client.delete(service.keys.lease("local", execution))
    assert "another attempt starts in" in state(sources, execution, "suspected").text


def test_a_stop_until_it_is_acknowledged(
    service: RunningService, sources: Sources, redis_server: RedisServer
) -> None:
    lease = running(service, redis_server)
    execution = lease.job.execution_id
    state(sources, execution, "leased")
    service.client.stop(execution, reason="terminated in the UI")
    assert "terminated in the UI" in state(sources, execution, "stop-sent").text
    lease.report(p.StopAcknowledged(signal="SIGINT", message="sent SIGINT to the command"))
    assert "sent SIGINT to the command" in state(sources, execution, "stop-acknowledged").text


def test_without_a_conductor(
    service: RunningService, sources: Sources, redis_server: RedisServer
) -> None:
    execution = submit(service, sources)
    service.kill()
    with redis_server.client() as client:  # as they expire
        client.delete(service.keys.service(), service.keys.conductors())
        client.delete(*(service.keys.shard(n) for n in range(service.records.shards)))
    assert why_execution(sources, execution).state == "no-conductor"


def test_without_redis(service: RunningService, sources: Sources) -> None:
    execution = submit(service, sources)
    away = redis.Redis(unix_socket_path="/nowhere.sock")
    found = why_execution(
        Sources(records=sources.records, broker=away, keys=sources.keys, settings=sources.settings),
        execution,
    )
    assert found.state == "no-redis"
    assert "queued in group local" in found.text


def test_an_unknown_execution(sources: Sources) -> None:
    with pytest.raises(NotFoundError, match="no execution"):
        why_execution(sources, "nope")
