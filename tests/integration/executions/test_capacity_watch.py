"""The service and the machines of groups: from an enqueue to the call, from a trouble to those who wait, from a death on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence

import pytest
import sqlalchemy as sa

from tests.support.redis_server import RedisServer
from tests.support.service import (
    RunningService,
    make_spec,
    running_service,
    shorten_leases,
    static_settings,
)
from tests.support.sim_agent import SimAgent
from tests.support.small_cloud import SmallCloud, cloud_group, until
from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.clouds.base import Launch, Trouble
from valohai_dagster.capacity.overrides import write_overrides
from valohai_dagster.executions import capacity_group
from valohai_dagster.executions.capacity_state import kick, read_state
from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.executions.stream import EventKind
from valohai_dagster.executions.why_reader import Sources, why_execution
from valohai_dagster.records.capacity_tables import agent_releases
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import DockerGroupSettings


@pytest.fixture
def cloud() -> SmallCloud:
    return SmallCloud()


@pytest.fixture
def cloudy(settings: Settings) -> Settings:
    return static_settings(settings, groups={"local": cloud_group(max_machines=3)})


@pytest.fixture
def service(cloudy: Settings, cloud: SmallCloud) -> Iterator[RunningService]:
    with running_service(cloudy, drivers=cloud.open) as service:
        yield service


def worker_on(
    service: RunningService, redis_server: RedisServer, machine_id: str, name: str = "w-1"
) -> SimAgent:
    """An agent that has checked in from a machine."""
    agent = service.agent(redis_server, name=name)
    agent.heartbeat(machine_id=machine_id)
    return agent


def why(service: RunningService, redis_server: RedisServer, execution_id: str) -> str:
    with redis_server.client(decode_responses=True) as broker:
        sources = Sources(
            records=service.records, broker=broker, keys=service.keys, settings=service.settings
        )
        return str(why_execution(sources, execution_id))


def test_an_enqueue_makes_the_cloud_called_at_once(service: RunningService, cloud: SmallCloud):
    service.client.submit(make_spec())
    until(lambda: cloud.called("launch"))
    (launch,) = cloud.called("launch")
    assert launch.count == 1
    assert len(cloud.machines) == 1


class SlowCloud(SmallCloud):
    """Launches take until `answer`."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = threading.Event()

    def launch(self, launch: Launch) -> Sequence[str]:
        made = super().launch(launch)
        self.answer.wait()
        return made


def test_an_enqueue_during_a_launch_is_asked_for_right_after_it_not_by_a_timer(
    cloudy: Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    for name in ("ROSTER_SECONDS", "LOOK_SECONDS", "QUIET_SECONDS", "SOON_SECONDS"):
        monkeypatch.setattr(capacity_group, name, 3600.0)
    slow = SlowCloud()
    with running_service(cloudy, drivers=slow.open) as service:
        service.client.submit(make_spec())
        until(lambda: slow.called("launch"))
        service.client.submit(make_spec())
        with redis_server.client() as broker:
            until(lambda: broker.zcard(service.keys.ready("local")) == 2)
        assert len(slow.called("launch")) == 1
        slow.answer.set()
        until(lambda: len(slow.called("launch")) == 2)
        assert len(slow.machines) == 2


def test_e05_as_many_machines_as_wait_and_no_more_than_allowed(
    service: RunningService, cloud: SmallCloud
):
    for _ in range(5):
        service.client.submit(make_spec())
    until(lambda: len(cloud.machines) == 3)
    assert sum(launch.count for launch in cloud.called("launch")) == 3


def test_a_machine_that_starts_is_told_to_who_asks_why(
    service: RunningService, cloud: SmallCloud, redis_server: RedisServer
):
    spec = make_spec()
    service.client.submit(spec)
    until(lambda: cloud.machines)
    until(lambda: "a machine starts since" in why(service, redis_server, spec.execution_id))


def test_a_refusal_is_told_to_those_who_wait_and_taken_back_when_it_is_over(
    service: RunningService, cloud: SmallCloud, redis_server: RedisServer
):
    cloud.no("the key AKIA1 is unknown to the cloud", Trouble.credentials)
    first, second = make_spec(), make_spec()
    service.client.submit(first)
    service.client.submit(second)
    for spec in (first, second):
        told = service.events(spec.execution_id, lambda e: "AKIA1" in e.message)[-1]
        assert told.kind is EventKind.warning
        assert "no machine comes up" in told.message
    assert "AKIA1" in why(service, redis_server, first.execution_id)
    cloud.refuse = None
    with redis_server.client(decode_responses=True) as broker:
        kick(broker, service.keys, "local", retry=True)
    over = service.events(first.execution_id, lambda e: "can come again" in e.message)[-1]
    assert over.kind is EventKind.state
    assert cloud.machines


def test_a_disabled_group_says_so_and_asks_for_no_machine(
    service: RunningService, cloud: SmallCloud, redis_server: RedisServer
):
    with service.records.write() as conn:
        write_overrides(conn, "local", {"enabled": False}, service.service.clock())  # type: ignore[union-attr]
    spec = make_spec()
    service.client.submit(spec)
    service.events(spec.execution_id, lambda e: "is disabled" in e.message)
    assert not cloud.called("launch")


def test_the_executions_of_a_machine_that_is_gone_are_queued_again(
    service: RunningService, cloud: SmallCloud, redis_server: RedisServer
):
    spec = make_spec()
    service.client.submit(spec)
    until(lambda: cloud.machines)
    (machine,) = cloud.machines
    agent = worker_on(service, redis_server, machine)
    agent.take().leased()
    agent.heartbeat(machine_id=machine, busy="1", state="busy")
    service.events(spec.execution_id, lambda e: e.data.get("status") == "started")
    cloud.lose(machine)
    lost = service.events(spec.execution_id, lambda e: e.attempt == 2, timeout=60.0)
    assert any(machine in event.message for event in lost)


def test_an_idle_machine_is_drained_first_and_then_ended(
    service: RunningService, cloud: SmallCloud, redis_server: RedisServer
):
    with service.records.write() as conn:
        values = {"scale_down_grace_seconds": 0}
        write_overrides(conn, "local", values, service.service.clock())  # type: ignore[union-attr]
    spec = make_spec()
    service.client.submit(spec)
    until(lambda: cloud.machines)
    (machine,) = cloud.machines
    agent = worker_on(service, redis_server, machine)
    lease = agent.take()
    lease.leased()
    agent.heartbeat(machine_id=machine, busy="1", state="busy")
    lease.finish(exit_code=0)
    service.final(spec.execution_id)
    assert not cloud.called("terminate")
    agent.heartbeat(machine_id=machine)
    until(lambda: [one.kind for one in agent.commands()] == ["drain"])
    assert not cloud.called("terminate")
    agent.redis.delete(agent.keys.worker("local", agent.name))  # it has drained and gone
    until(lambda: not cloud.machines)
    assert cloud.called("terminate") == [machine]


def test_another_conductor_goes_on_with_a_group_when_its_holder_falls_silent(
    cloudy: Settings, cloud: SmallCloud, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    shorten_leases(monkeypatch)
    monkeypatch.setattr("valohai_dagster.executions.capacity_watch.LEASE_SECONDS", 2.5)
    monkeypatch.setattr("valohai_dagster.executions.capacity_watch.RENEW_SECONDS", 0.5)
    other_place = cloudy.model_copy(
        update={"state_dir": tmp_path / "other", "database_url": cloudy.records_url}
    )
    with running_service(cloudy, drivers=cloud.open) as one:
        until(lambda: one.service and list(one.service.capacity.held))
        with running_service(other_place, drivers=cloud.open) as two:
            assert two.service
            assert not two.service.capacity.held
            with one.paused():
                until(lambda: two.service and list(two.service.capacity.held))
                two.client.submit(make_spec())


def test_an_enqueue_at_another_conductor_reaches_the_one_that_looks_after_the_group(
    cloudy: Settings, cloud: SmallCloud, redis_server: RedisServer
):
    with running_service(cloudy, drivers=cloud.open) as service:
        assert service.service
        until(lambda: service.service and list(service.service.capacity.held))
        with redis_server.client(decode_responses=True) as broker:
            until(lambda: read_state(broker, service.keys, "local"))
            before = read_state(broker, service.keys, "local")
            kick(broker, service.keys, "local")
            until(lambda: read_state(broker, service.keys, "local") != before, seconds=3.0)


def test_without_a_published_agent_those_who_wait_are_told_to_publish_one(
    settings: Settings, cloud: SmallCloud
):
    groups = {"local": DockerGroupSettings(kind="docker", image="machine")}
    with running_service(static_settings(settings, groups=groups), drivers=cloud.open) as service:
        spec = make_spec()
        service.client.submit(spec)
        service.events(spec.execution_id, lambda e: "no agent is published" in e.message)
    assert not cloud.called("launch")


def test_idle_workers_of_another_version_are_told_to_make_way(
    settings: Settings, cloud: SmallCloud, redis_server: RedisServer
):
    groups = {"local": DockerGroupSettings(kind="docker", image="machine")}
    service = RunningService(static_settings(settings, groups=groups), drivers=cloud.open)
    with service.records.write() as conn:
        publish_row(conn, "1.4.1")
    try:
        agent = service.agent(redis_server)
        agent.heartbeat(version="1.4.0", machine_id="m-1", supervised="1")
        service.start()
        until(lambda: [one.kind for one in agent.commands()] == ["update"])
    finally:
        service.close()


def publish_row(conn: sa.Connection, version: str) -> None:
    """As if an agent of this version had been published."""
    about = {"store": "local", "key": "agents/a.pyz", "size": 1, "protocol": 1, "protocol_min": 1}
    values = {"version": version, "sha256": "a" * 64, "current": True, "ctime": utcnow(), **about}
    conn.execute(agent_releases.insert().values(values))


def test_a_conductor_that_ends_when_redis_has_come_back_empty_ends_in_order(
    cloudy: Settings,
    cloud: SmallCloud,
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    async def not_yet(core: ServiceCore) -> None:
        await asyncio.sleep(1)

    with running_service(cloudy, drivers=cloud.open) as running:
        service = running.service
        assert service is not None
        until(lambda: "local" in service.capacity.held)
        monkeypatch.setattr(ServiceCore, "load_functions", not_yet)
        with redis_server.client() as broker:
            broker.flushall()
            broker.function_flush()
        running.leave()
        assert "could not be handed over" in caplog.text
        assert not service.capacity.held
