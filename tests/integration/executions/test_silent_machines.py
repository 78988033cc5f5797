"""Machines whose workers are not heard of keep what they may still compute, on a real Redis (LESSONS 2, PROTOCOL's losses)."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest

from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service, static_settings
from tests.support.sim_agent import SimAgent
from tests.support.small_cloud import SmallCloud, cloud_group, until
from valohai_agent.protocol import Leased, utcnow
from valohai_dagster.capacity.overrides import write_overrides
from valohai_dagster.executions.capacity_state import kick, read_state
from valohai_dagster.records.capacity_tables import machines
from valohai_dagster.settings import Settings

GROUP = "local"


@pytest.fixture
def cloud() -> SmallCloud:
    return SmallCloud()


@pytest.fixture
def service(
    settings: Settings, cloud: SmallCloud, own_redis: RedisServer
) -> Iterator[RunningService]:
    group = cloud_group(max_machines=1, scale_down_grace_seconds=3600)
    cloudy = static_settings(settings, groups={GROUP: group}, redis_url=own_redis.unix_url)
    with running_service(cloudy, drivers=cloud.open) as service:
        yield service


def works(service: RunningService, cloud: SmallCloud, own_redis: RedisServer) -> SimAgent:
    """A worker that has taken an execution, on a machine that came for it."""
    spec = make_spec()
    service.client.submit(spec)
    until(lambda: cloud.machines)
    (machine,) = cloud.machines
    agent = service.agent(own_redis, name="w-1")
    agent.heartbeat(machine_id=machine)
    agent.take().report(Leased(runtime="simulated", host="sim", machine_id=machine))
    agent.heartbeat(machine_id=machine, busy="1", state="busy")
    service.events(spec.execution_id, lambda e: e.data.get("status") == "started")
    return agent


def looks(service: RunningService, own_redis: RedisServer, number: int = 3) -> None:
    """The group is looked at so many times more."""
    with own_redis.client(decode_responses=True) as broker:
        for _ in range(number):
            before = read_state(broker, service.keys, GROUP)
            kick(broker, service.keys, GROUP)
            until(lambda before=before: read_state(broker, service.keys, GROUP) != before)


def test_after_an_outage_of_the_broker_no_machine_is_ended_that_could_not_be_heard(
    service: RunningService, cloud: SmallCloud, own_redis: RedisServer
):
    works(service, cloud, own_redis)
    until(lambda: _seen(service))
    own_redis.kill()
    with service.records.write() as conn:  # it was a long outage
        long_ago = utcnow() - timedelta(hours=1)
        conn.execute(machines.update().values(worker_seen_at=long_ago))
    own_redis.restart(empty=True)
    with own_redis.client() as broker:
        until(broker.function_list)
    looks(service, own_redis)
    assert not cloud.called("terminate")


def test_a_machine_that_drains_is_not_ended_while_its_worker_is_cut_off_with_work(
    service: RunningService, cloud: SmallCloud, own_redis: RedisServer
):
    agent = works(service, cloud, own_redis)
    (machine,) = cloud.machines
    agent.heartbeat(machine_id=machine, busy="1", state="draining")
    with service.records.write() as conn:
        conn.execute(machines.update().values(draining_since=utcnow()))
        write_overrides(conn, GROUP, {"scale_down_grace_seconds": 0}, utcnow())
    looks(service, own_redis, 1)
    agent.redis.delete(agent.keys.worker(GROUP, agent.name))  # as thirty seconds of silence do
    looks(service, own_redis)
    assert not cloud.called("terminate")


def _seen(service: RunningService) -> bool:
    with service.records.read() as conn:
        return conn.execute(machines.select()).one().worker_seen_at is not None
