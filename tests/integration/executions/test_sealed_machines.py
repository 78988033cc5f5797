"""No work gets to a machine that is about to be ended (E-05), on a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service, static_settings
from tests.support.small_cloud import until
from valohai_dagster.settings import Settings

pytestmark = pytest.mark.redis
GROUP = "local"


@pytest.fixture
def service(settings: Settings) -> Iterator[RunningService]:
    with running_service(static_settings(settings)) as service:
        yield service


def seal(service: RunningService, machine_id: str) -> bool:
    """As the conductor does."""
    from redis.asyncio import Redis

    from valohai_dagster.executions.dispatch import Dispatch

    async def run() -> bool:
        async with Redis.from_url(
            service.settings.redis_url or "", decode_responses=True
        ) as broker:
            return await Dispatch(broker, service.keys).seal(GROUP, machine_id)

    return asyncio.run(run())


def test_e05_a_worker_that_checks_in_after_the_seal_gets_no_job(
    service: RunningService, redis_server: RedisServer
):
    assert seal(service, "m-1")
    service.client.submit(make_spec())
    late, other = (service.agent(redis_server, name=name) for name in ("late", "other"))
    late.heartbeat(machine_id="m-1")
    other.heartbeat(machine_id="m-2")
    until(lambda: late.redis.zcard(late.keys.ready(GROUP)))
    assert late.try_take() is None
    assert other.try_take() is not None


def test_e05_a_machine_with_a_worker_is_not_sealed(
    service: RunningService, redis_server: RedisServer
):
    agent = service.agent(redis_server, name="early")
    agent.heartbeat(machine_id="m-1")
    assert not seal(service, "m-1")
    service.client.submit(make_spec())
    assert agent.take()
