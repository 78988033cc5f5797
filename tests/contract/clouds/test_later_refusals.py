"""Google Cloud, Azure and OpenStack accept a launch and may find out later that there is no room: with the real reconciler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.support.clock import FakeClock
from tests.support.clouds.rig import GROUP
from tests.support.clouds.rigs import azure, gcp, openstack
from valohai_dagster.capacity.look import Load
from valohai_dagster.capacity.model import Policy
from valohai_dagster.capacity.reconcile import Reconciler
from valohai_dagster.capacity.simulation.book import MemoryBook

TICK, LOOKS = 10.0, 6  # seconds between looks


def _fail_on_google(rig: Any, machine_id: str) -> None:
    one = rig.world.machine(machine_id)
    one.action, one.status = "CREATING", ""
    one.error = ("ZONE_RESOURCE_POOL_EXHAUSTED", "The zone does not have enough resources")


def _fail_on_azure(rig: Any, machine_id: str) -> None:
    one = rig.world.machines[machine_id]
    one.provisioning, one.power = "Failed", ""
    one.error = ("ZonalAllocationFailed", "We do not have sufficient capacity")


def _fail_on_openstack(rig: Any, machine_id: str) -> None:
    words = "No valid host was found. There are not enough hosts available."
    server = rig.cloud.servers[machine_id]
    server |= {"status": "ERROR", "OS-EXT-STS:task_state": None, "fault": {"message": words}}


_CLOUDS = {"gcp": (gcp, _fail_on_google), "azure": (azure, _fail_on_azure)}
if not openstack.REAL:
    _CLOUDS["openstack"] = (openstack, _fail_on_openstack)


@pytest.fixture(params=_CLOUDS.values(), ids=list(_CLOUDS))
def cloud(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Any, Callable[[Any, str], None]]]:
    module, fail = request.param
    with ExitStack() as stack:
        server = stack.enter_context(module.serving())
        yield stack.enter_context(module.opened(server, tmp_path)), fail


def test_another_zone_is_tried_when_the_refusal_comes_later(
    cloud: tuple[Any, Callable[[Any, str], None]],
) -> None:
    rig, fail = cloud
    first, second = rig.zones[:2]
    driver, book = rig.driver(zones=[first, second]), MemoryBook()
    clock, tokens = FakeClock(datetime.now(timezone.utc)), (f"token-{one}" for one in count())
    reconciler = Reconciler(
        GROUP,
        driver,
        book,
        prepare=lambda wanted: wanted,
        clock=clock,
        make_token=lambda: next(tokens),
    )
    policy = Policy(max_machines=1, zones=(first, second))
    reconciler.step(Load(waiting={0: 1}), policy)
    (machine,) = driver.list()
    assert machine.zone == first
    fail(rig, machine.id)
    zones: list[str] = []
    for _ in range(LOOKS):
        clock.advance(TICK)
        reconciler.step(Load(waiting={0: 1}), policy)
        rig.settle()
        zones = [one.zone for one in driver.list()]
        if zones == [second]:
            break
    assert zones == [second], book.history
    told = " ".join(str(line) for line in book.history)
    assert any(
        one in told
        for one in ("enough resources", "sufficient capacity", "No valid host was found")
    )
