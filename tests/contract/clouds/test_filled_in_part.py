"""A launch for which there are only some of the machines: what came is told, and why not more, on every driver."""

from __future__ import annotations

from contextlib import suppress

import pytest

from tests.support.clouds.rig import GROUP, Rig
from valohai_dagster.capacity.clouds.base import CloudError, Driver, Launch, Trouble
from valohai_dagster.capacity.model import MachineState

GOING = (MachineState.terminating, MachineState.gone)
WANTED = Launch(token="t-1", count=2, user_data="#!/bin/sh\n# t-1\n")


def listed(driver: Driver) -> list[str]:
    return sorted(one.id for one in driver.list() if one.state not in GOING)


@pytest.fixture(params=[Trouble.capacity, Trouble.quota], ids=lambda one: one.value)
def trouble(request: pytest.FixtureRequest) -> Trouble:
    return request.param


def test_what_came_is_told_and_why_not_more(rig: Rig, trouble: Trouble) -> None:
    driver = rig.driver()
    with rig.refuse(trouble, room=1):
        with pytest.raises(CloudError) as caught:
            driver.launch(WANTED)
        assert caught.value.trouble is trouble
        assert GROUP in str(caught.value)
        rig.settle()
        assert listed(driver) == list(caught.value.made)
        assert len(caught.value.made) == 1
    rig.settle()
    assert listed(rig.driver()) == list(caught.value.made)


def test_repeated_by_another_process_it_makes_no_more_than_were_asked_for(
    rig: Rig, trouble: Trouble
) -> None:
    with rig.refuse(trouble, room=1), pytest.raises(CloudError) as caught:
        rig.driver().launch(WANTED)
    rig.settle()
    with suppress(CloudError):
        rig.driver().launch(WANTED)
    rig.settle()
    found = listed(rig.driver())
    assert set(caught.value.made) <= set(found)
    assert len(found) <= WANTED.count
