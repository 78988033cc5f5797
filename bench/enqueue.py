"""How long it takes from a client's submit until a cloud is asked for one more machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.clouds.rigs import aws
from tests.support.machines import small_agent_file
from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service
from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.bootstrap.releases import publish
from valohai_dagster.capacity.clouds.aws import AwsDriver
from valohai_dagster.capacity.clouds.base import Driver, Launch
from valohai_dagster.capacity.clouds.registry import OpenDriver
from valohai_dagster.capacity.clouds.simulated import SimulatedDriver
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import (
    AwsGroupSettings,
    CloudGroupSettings,
    SimulatedGroupSettings,
)
from valohai_dagster.stores.registry import open_stores

GROUP = "local"  # where specs go that name no environment
CONTROL_PLANE = "control-plane.example"  # no machine comes so far as to connect to it
DEADLINE = 60.0
Times = Callable[[], Sequence[float]]  # of all calls so far, by time.monotonic


class TimedDriver(SimulatedDriver):
    """Notes when launches are asked for."""

    asked: list[float]

    def launch(self, launch: Launch) -> Sequence[str]:
        self.asked.append(time.monotonic())
        return super().launch(launch)


def to_simulated(rounds: int) -> list[float]:
    """Seconds, each when all machines that were asked for are still booting, until the simulated cloud's driver is asked."""
    asked: list[float] = []
    with tempfile.TemporaryDirectory(prefix="vhb-", dir="/tmp") as work:
        home = Path(work)

        def drivers(name: str, group: CloudGroupSettings) -> Driver:
            assert isinstance(group, SimulatedGroupSettings)
            driver = TimedDriver(name, group, deployment="bench", state_dir=home / "state")
            driver.asked = asked
            return driver

        group = SimulatedGroupSettings(kind="simulated", max_machines=rounds, boot_delay_seconds=60)
        with _service(home, group, drivers) as service:
            return [_one_call(service.client, lambda: asked) for _ in range(rounds)]


def to_aws(rounds: int) -> list[float]:
    """The same with the driver of AWS, until LaunchInstances arrives at moto: what comes before it is part of the time."""

    def drivers(name: str, group: CloudGroupSettings) -> Driver:
        assert isinstance(group, AwsGroupSettings)
        return AwsDriver(name, group, deployment="bench")

    with tempfile.TemporaryDirectory(prefix="vhb-", dir="/tmp") as work, aws.serving() as account:
        home = Path(work)
        with aws.opened(account, home) as rig:
            group = rig.settings(max_machines=rounds, local_stores=True)
            with _service(home, group, drivers) as service:
                file = small_agent_file(home / "agent.pyz")
                store = open_stores(service.settings).default
                publish(service.records, store, file, now=utcnow())
                return [
                    _one_call(service.client, lambda: rig.server.order("launched"))
                    for _ in range(rounds)
                ]


@contextmanager
def _service(
    home: Path, group: AwsGroupSettings | SimulatedGroupSettings, drivers: OpenDriver
) -> Iterator[RunningService]:
    server = RedisServer(home / "redis").start()
    settings = Settings(
        state_dir=home / "state",
        redis_url=server.unix_url,
        agent_redis_url=f"redis://{CONTROL_PLANE}:6379/0",
        join_url=f"http://{CONTROL_PLANE}",
        groups={GROUP: group},
    )
    try:
        with running_service(settings, drivers=drivers) as service:
            yield service
    finally:
        server.stop()


def _one_call(client: Any, calls: Times) -> float:
    before, began = len(calls()), time.monotonic()
    client.submit(make_spec())
    while len(times := calls()) == before:
        if time.monotonic() - began > DEADLINE:
            raise TimeoutError(f"no machine was asked for within {DEADLINE:g} s of an enqueue")
        time.sleep(0.005)
    return times[before] - began
