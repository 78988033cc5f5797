"""Several conductors share the executions: any of them may die, stand still or go, and another goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, shorten_leases, static_settings
from tests.support.sim_agent import SimAgent, SimLease
from valohai_agent import protocol as p
from valohai_dagster.executions import share_out
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView
from valohai_dagster.executions.writing import ShardLost
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings

SHARDS = 4


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return request.getfixturevalue("postgres_url")
    return f"sqlite:///{tmp_path / 'shared.db'}"


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_leases(monkeypatch)


class Conductors:
    """Several services on the same records and the same Redis, each with a state directory of its own."""

    def __init__(self, settings: Settings, database: str, directory: Path) -> None:
        store = {"local": {"kind": "local", "path": directory / "store"}}
        key = directory / "secret.key"
        values = {"database_url": database, "shards": SHARDS, "stores": store}
        self._settings = static_settings(settings, **values, secret_key_file=key)
        self._directory = directory
        self._started: list[RunningService] = []

    def start(self) -> RunningService:
        state = self._directory / f"conductor-{len(self._started)}"
        settings = Settings(**{**self._settings.model_dump(), "state_dir": state})
        service = RunningService(settings).start()
        self._started.append(service)
        return service

    def close(self) -> None:
        for service in self._started:
            service.close()


@pytest.fixture
def conductors(settings: Settings, database: str, tmp_path: Path) -> Iterator[Conductors]:
    with contextlib.closing(Conductors(settings, database, tmp_path)) as conductors:
        yield conductors


def wait_until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def shared(*services: RunningService) -> bool:
    held = [shard for service in services for shard in service.held]
    return sorted(held) == list(range(SHARDS)) and all(service.held for service in services)


def spec_in(service: RunningService, shard: int, **values: Any) -> ExecutionSpec:
    """A spec that belongs to the shard."""
    while True:
        spec = make_spec(**values)
        if service.records.shard_of(spec.run_id or spec.execution_id) == shard:
            return spec


def running(service: RunningService, agent: SimAgent, shard: int) -> SimLease:
    service.client.submit(spec_in(service, shard))
    lease = agent.take()
    lease.leased()
    lease.wait_grants()
    return lease


def final_view(service: RunningService, execution_id: str) -> ExecutionView:
    return ExecutionView.model_validate(service.final(execution_id, timeout=30).data)


def metadata_rows(service: RunningService, execution_id: str) -> int:
    mine = t.metadata_events.c.execution_id == execution_id
    query = sa.select(sa.func.count()).select_from(t.metadata_events).where(mine)
    with service.records.read() as conn:
        return conn.execute(query).scalar_one()


def test_two_conductors_share_the_shards_and_each_serves_its_own(
    conductors: Conductors, redis_server: RedisServer
):
    one, other = conductors.start(), conductors.start()
    wait_until(lambda: shared(one, other))
    assert len(one.held) == len(other.held) == SHARDS // 2
    agent = one.agent(redis_server)
    for service in (one, other):
        lease = running(one, agent, min(service.held))
        lease.store("model.bin", b"weights")
        lease.finish()
        view = final_view(other, lease.job.execution_id)
        assert view.status is ExecutionStatus.complete
        assert [output.name for output in view.outputs] == ["model.bin"]


def test_a_conductor_that_goes_hands_its_shards_over_at_once(
    conductors: Conductors, redis_server: RedisServer
):
    """The lease of a quarter of a minute plays no part."""
    one = conductors.start()
    wait_until(lambda: shared(one))
    lease = running(one, one.agent(redis_server), 0)
    other = conductors.start()
    wait_until(lambda: shared(one, other))
    began = time.monotonic()
    one.leave()
    wait_until(lambda: shared(other))
    assert time.monotonic() - began < share_out.LEASE_SECONDS - share_out.MARGIN_SECONDS
    lease.finish()
    assert final_view(other, lease.job.execution_id).status is ExecutionStatus.complete


@pytest.mark.usefixtures("short_leases")
def test_what_a_dead_conductor_had_in_hand_goes_on_with_another(
    conductors: Conductors, redis_server: RedisServer
):
    one, other = conductors.start(), conductors.start()
    wait_until(lambda: shared(one, other))
    shard = min(one.held)
    lease = running(one, one.agent(redis_server), shard)
    waiting = spec_in(one, shard)
    one.kill()
    other.client.submit(waiting)
    lease.report(p.MetadataEvents(events=[{"while": "nobody listens"}]))
    lease.finish()
    view = final_view(other, lease.job.execution_id)
    assert view.status is ExecutionStatus.complete
    assert view.latest_metadata["while"] == "nobody listens"
    assert metadata_rows(other, lease.job.execution_id) == 1
    assert lease.agent.take(timeout=20).job.execution_id == waiting.execution_id


@pytest.mark.usefixtures("short_leases")
@pytest.mark.parametrize("trusting", [False, True], ids=["by its clock", "by the fence"])
def test_a_conductor_that_stood_still_and_wakes_up_applies_nothing(
    conductors: Conductors,
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    trusting: bool,
):
    """Reports that had reached it before it stood still are dropped; even one that trusts its lease is refused."""
    one = conductors.start()
    wait_until(lambda: shared(one))
    lease = running(one, one.agent(redis_server), 1)
    execution_id = lease.job.execution_id
    assert one.service is not None
    if trusting:
        monkeypatch.setattr(one.service.shards, "may_write", lambda shard: True)
    with one.paused():
        lease.report(p.MetadataEvents(events=[{"step": 1}]))
        other = conductors.start()
        wait_until(lambda: 1 in other.held)
        other.events(execution_id, lambda event: event.kind is EventKind.metadata)
    wait_until(lambda: 1 not in one.held)
    lease.report(p.MetadataEvents(events=[{"step": 2}]))
    lease.finish()
    assert final_view(other, execution_id).latest_metadata["step"] == 2
    assert metadata_rows(other, execution_id) == 2
    told = [e.kind for e in other.client.follow(execution_id) if e is not None]
    assert told.count(EventKind.metadata) == 2
    assert told.count(EventKind.final) == 1


@pytest.mark.usefixtures("short_leases")
def test_a_conductor_that_lost_some_shards_goes_on_with_its_others(
    conductors: Conductors, redis_server: RedisServer
):
    one = conductors.start()
    wait_until(lambda: shared(one))
    with one.paused():
        other = conductors.start()
        wait_until(lambda: shared(other))
    wait_until(lambda: shared(one, other))
    lease = running(other, other.agent(redis_server), min(one.held))
    lease.finish()
    assert final_view(other, lease.job.execution_id).status is ExecutionStatus.complete


def test_a_write_for_a_lost_shard_is_undone(conductors: Conductors):
    """What another conductor's fence refuses leaves no trace."""
    one = conductors.start()
    wait_until(lambda: shared(one))
    spec = spec_in(one, 2)
    one.client.submit(spec)
    one.events(spec.execution_id, lambda event: event.kind is EventKind.snapshot)
    with one.records.write() as conn:
        conn.execute(t.shards.update().where(t.shards.c.shard == 2).values(fence=99))
    service = one.service
    assert service is not None

    def change(writing: Any) -> None:
        active = writing.find(spec.execution_id)
        writing.update(active, status_detail="by mistake")
        writing.change(active, priority=7)

    async def attempt(_: Any) -> None:
        with pytest.raises(ShardLost, match="shard 2"):
            await service.transact(change)

    one.call(attempt)
    assert service.memory.active[spec.execution_id].priority == 0
    view = one.client.view(spec.execution_id)
    assert view is not None
    assert view.status_detail is None


def test_one_that_is_restarted_in_its_place_takes_its_shards_at_once(
    conductors: Conductors, redis_server: RedisServer
):
    one = conductors.start()
    wait_until(lambda: shared(one))
    lease = running(one, one.agent(redis_server), 3)
    one.kill()
    began = time.monotonic()
    one.start()
    wait_until(lambda: shared(one))
    assert time.monotonic() - began < share_out.LEASE_SECONDS - share_out.MARGIN_SECONDS
    lease.finish()
    assert final_view(one, lease.job.execution_id).status is ExecutionStatus.complete


def test_a_death_that_one_conductor_sees_requeues_an_execution_of_another(
    conductors: Conductors, redis_server: RedisServer
):
    one, other = conductors.start(), conductors.start()
    wait_until(lambda: shared(one, other))
    lease = running(one, one.agent(redis_server, "sim-1"), min(other.held))
    one.call(lambda service: service.worker_gone("local", "sim-1", "its agent process ended"))
    again = one.agent(redis_server, "sim-2").take(timeout=15)
    assert (again.job.execution_id, again.attempt) == (lease.job.execution_id, 2)


def test_a_stop_reaches_the_conductor_that_has_the_execution(
    conductors: Conductors, redis_server: RedisServer
):
    one, other = conductors.start(), conductors.start()
    wait_until(lambda: shared(one, other))
    agent = one.agent(redis_server)
    lease = running(one, agent, min(other.held))
    stop = {"hard": False, "reason": "enough"}
    one.call(lambda service: service.stop(lease.job.execution_id, **stop))
    one.events(lease.job.execution_id, lambda event: "stop sent to worker" in event.message)
    lease.finish(p.Outcome.stopped)
    view = final_view(one, lease.job.execution_id)
    assert (view.status, view.reason) == (ExecutionStatus.stopped, "enough")


def test_an_execution_that_another_run_joins_goes_over_to_that_runs_conductor(
    conductors: Conductors, redis_server: RedisServer
):
    """One conductor has all of a run in hand; reports of the old shard find their way."""
    one, other = conductors.start(), conductors.start()
    wait_until(lambda: shared(one, other))
    lease = running(one, one.agent(redis_server), min(one.held))
    execution_id = lease.job.execution_id
    again = spec_in(one, min(other.held)).model_copy(update={"execution_id": execution_id})
    service = other.service
    assert service is not None
    heard: list[EventKind] = []
    service.listen(
        lambda told, events: heard.extend(e.kind for e in events if told == execution_id)
    )
    views: list[ExecutionView] = []

    async def submit(_: Any) -> None:
        views.append(await service.submit(again))

    other.call(submit)
    assert views[0].status is ExecutionStatus.started
    wait_until(lambda: EventKind.snapshot in heard)
    lease.report(p.MetadataEvents(events=[{"n": 1}]))
    lease.finish()
    wait_until(lambda: EventKind.final in heard)
    assert heard.count(EventKind.metadata) == 1
    assert final_view(one, execution_id).status is ExecutionStatus.complete
