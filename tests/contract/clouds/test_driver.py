"""What every driver does alike, against the servers that stand for the clouds (LESSONS 3, 4 and 19).

Which server that is, real, emulator or stand-in, is said in the module of the kind in tests/support/clouds/rigs.
Groups of the kinds `local` and `static` have no machines that come and go, so no driver: agents of this host are in
tests/integration/executions/test_local_group.py and tests/unit/capacity/test_agent_planner.py, machines of one's own in
tests/integration/agent/test_machine.py.
"""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from tests.support.clouds.rig import DEPLOYMENT, GROUP, OTHER_GROUP, Rig
from valohai_dagster.capacity.clouds.base import CloudError, Driver, Launch, Trouble, identity_tags
from valohai_dagster.capacity.model import Machine, MachineState, Purchase

HERE = (MachineState.starting, MachineState.running)


def launch(
    token: str, *, count: int = 1, zone: str = "", tags: dict[str, str] | None = None
) -> Launch:
    return Launch(
        token=token, count=count, zone=zone, user_data=f"#!/bin/sh\n# {token}\n", tags=tags or {}
    )


def listed(driver: Driver) -> dict[str, Machine]:
    """Machines that are not on their way out."""
    going = (MachineState.terminating, MachineState.gone)
    return {one.id: one for one in driver.list() if one.state not in going}


def launched(rig: Rig, driver: Driver, wanted: Launch) -> list[str]:
    """Ids of what the launch made, once it is all there."""
    driver.launch(wanted)
    rig.settle()
    return [one.id for one in listed(driver).values() if one.token == wanted.token]


def test_an_empty_account_has_no_machines_and_no_problems(rig: Rig) -> None:
    driver = rig.driver()
    assert driver.kind == rig.kind
    assert list(driver.check()) == []
    assert list(driver.list()) == []


def test_a_launch_makes_as_many_machines_as_it_says(rig: Rig) -> None:
    driver, before = rig.driver(), datetime.now(timezone.utc)
    ids = launched(rig, driver, launch("t-1", count=2))
    assert len(set(ids)) == 2
    for one in listed(driver).values():
        assert one.state in HERE
        assert one.token == "t-1"
        assert one.purchase is Purchase.on_demand
        assert one.created_at.tzinfo is not None
        assert abs((one.created_at - before).total_seconds()) < 600
        assert rig.alive(one.id)


def test_ids_told_at_once_are_those_of_the_list(rig: Rig) -> None:
    driver = rig.driver()
    told = driver.launch(launch("t-1", count=2))
    rig.settle()
    assert set(told) <= set(listed(driver))


def test_a_launch_repeated_makes_no_second_machine(rig: Rig) -> None:
    driver = rig.driver()
    first = launched(rig, driver, launch("t-1", count=2))
    assert sorted(launched(rig, driver, launch("t-1", count=2))) == sorted(first)


def test_a_launch_repeated_by_another_process_makes_no_second_machine(rig: Rig) -> None:
    first = launched(rig, rig.driver(), launch("t-1"))
    assert launched(rig, rig.driver(), launch("t-1")) == first


def test_a_launch_repeated_while_lists_lag_makes_no_second_machine(rig: Rig) -> None:
    with rig.lag():
        rig.driver().launch(launch("t-1"))
        rig.driver().launch(launch("t-1"))
    rig.settle()
    assert len(listed(rig.driver())) == 1


def test_launches_with_different_tokens_are_different_machines(rig: Rig) -> None:
    driver = rig.driver()
    driver.launch(launch("t-1"))
    driver.launch(launch("t-2", count=2))
    rig.settle()
    tokens = sorted(one.token or "" for one in listed(driver).values())
    assert tokens == ["t-1", "t-2", "t-2"]


def test_e41_machines_carry_what_marks_them_as_ours(rig: Rig) -> None:
    driver, wanted = rig.driver(), launch("t-1", tags={"valohai-bootstrap": "v7"})
    (machine_id,) = launched(rig, driver, wanted)
    found = rig.tags(machine_id)
    assert identity_tags(DEPLOYMENT, GROUP, wanted).items() <= found.items()
    assert listed(driver)[machine_id].bootstrap == "v7"


def test_each_launch_has_its_own_user_data(rig: Rig) -> None:
    driver = rig.driver()
    (first,) = launched(rig, driver, launch("t-1"))
    (second,) = launched(rig, driver, launch("t-2"))
    assert "# t-1\n" in rig.user_data(first)
    assert "# t-2\n" in rig.user_data(second)


def test_machines_are_launched_in_the_zone_that_is_asked_for(rig: Rig) -> None:
    if len(rig.zones) < 2:
        rig.cannot("zones")
    driver = rig.driver(zones=list(rig.zones))
    for number, zone in enumerate(rig.zones):
        (machine_id,) = launched(rig, driver, launch(f"t-{number}", zone=zone))
        assert listed(driver)[machine_id].zone == zone


def test_spot_machines_are_listed_as_such(rig: Rig) -> None:
    if not rig.spot:
        rig.cannot("spot")
    driver = rig.driver(spot=True)
    driver.launch(Launch(token="t-1", purchase=Purchase.spot))
    driver.launch(Launch(token="t-2", purchase=Purchase.on_demand))
    rig.settle()
    purchases = {one.token: one.purchase for one in driver.list()}
    assert purchases == {"t-1": Purchase.spot, "t-2": Purchase.on_demand}


# -- terminating ---------------------------------------------------------------------------------------------------


def test_exactly_the_named_machine_is_terminated_and_not_replaced(rig: Rig) -> None:
    driver = rig.driver()
    first, second, third = sorted(launched(rig, driver, launch("t-1", count=3)))
    driver.terminate(second)
    rig.settle()
    assert sorted(listed(driver)) == [first, third]
    assert (rig.alive(first), rig.alive(second), rig.alive(third)) == (True, False, True)


def test_terminating_what_is_gone_already_is_fine(rig: Rig) -> None:
    driver = rig.driver()
    (machine_id,) = launched(rig, driver, launch("t-1"))
    driver.terminate(machine_id)
    driver.terminate(machine_id)
    rig.settle()
    rig.driver().terminate(machine_id)
    assert listed(driver) == {}


def test_what_somebody_else_destroyed_is_not_listed_nor_replaced(rig: Rig) -> None:
    driver = rig.driver()
    first, second = launched(rig, driver, launch("t-1", count=2))
    rig.vanish(first)
    rig.settle()
    assert list(listed(driver)) == [second]
    rig.settle()
    assert list(listed(driver)) == [second]
    driver.terminate(first)
    assert list(listed(driver)) == [second]


def test_a_launch_repeated_after_its_machine_went_makes_none(rig: Rig) -> None:
    """A late repetition of a call must not bring back what was terminated since."""
    if "remembers" in rig.limits:
        rig.cannot("remembers")
    driver = rig.driver()
    (machine_id,) = launched(rig, driver, launch("t-1"))
    driver.terminate(machine_id)
    driver.launch(launch("t-1"))
    rig.settle()
    assert listed(driver) == {}


def test_launching_goes_on_after_terminating(rig: Rig) -> None:
    driver = rig.driver()
    (machine_id,) = launched(rig, driver, launch("t-1"))
    driver.terminate(machine_id)
    rig.settle()
    assert len(launched(rig, driver, launch("t-2"))) == 1
    assert len(listed(driver)) == 1


# -- stopping ------------------------------------------------------------------------------------------------------


def test_a_stopped_machine_is_kept_and_starts_again(rig: Rig) -> None:
    driver = rig.driver()
    if not driver.can_stop:
        rig.cannot("stop")
    first, second = launched(rig, driver, launch("t-1", count=2))
    driver.stop(first)
    rig.settle()
    states = {one.id: one.state for one in driver.list()}
    assert states == {first: MachineState.stopped, second: MachineState.running}
    assert rig.alive(first)
    driver.start(first)
    rig.settle()
    assert {one.state for one in driver.list()} == {MachineState.running}


def test_stopping_and_starting_twice_is_fine(rig: Rig) -> None:
    driver = rig.driver()
    if not driver.can_stop:
        rig.cannot("stop")
    (machine_id,) = launched(rig, driver, launch("t-1"))
    driver.stop(machine_id)
    driver.stop(machine_id)
    rig.settle()
    rig.driver().start(machine_id)
    driver.start(machine_id)
    rig.settle()
    assert listed(driver)[machine_id].state is MachineState.running


def test_a_stopped_machine_can_be_terminated(rig: Rig) -> None:
    driver = rig.driver()
    if not driver.can_stop:
        rig.cannot("stop")
    (machine_id,) = launched(rig, driver, launch("t-1"))
    driver.stop(machine_id)
    rig.settle()
    driver.terminate(machine_id)
    rig.settle()
    assert listed(driver) == {}
    assert not rig.alive(machine_id)


# -- other people's machines ---------------------------------------------------------------------------------------


def test_machines_of_others_are_not_listed_and_not_terminated(rig: Rig) -> None:
    driver, theirs = rig.driver(), rig.foreign()
    (ours,) = launched(rig, driver, launch("t-1"))
    assert list(listed(driver)) == [ours]
    with pytest.raises(CloudError, match=theirs):
        driver.terminate(theirs)
    driver.terminate(ours)
    rig.settle()
    assert rig.alive(theirs)


def test_groups_do_not_see_each_other(rig: Rig) -> None:
    ours, others = rig.driver(), rig.driver(group=OTHER_GROUP)
    (first,) = launched(rig, ours, launch("t-1"))
    (second,) = launched(rig, others, launch("t-1"))
    assert first != second
    assert (list(listed(ours)), list(listed(others))) == ([first], [second])


def test_protecting_a_machine_from_the_clouds_own_scaling(rig: Rig) -> None:
    """Where there is no such scaling, nothing happens and nothing is wrong (E-05)."""
    driver = rig.driver()
    (machine_id,) = launched(rig, driver, launch("t-1"))
    driver.protect(machine_id, on=True)
    assert rig.protected(machine_id)
    driver.protect(machine_id, on=False)
    assert not rig.protected(machine_id)


# -- troubles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", list(Trouble), ids=lambda one: one.value)
def test_a_refusal_is_of_its_kind_and_clears_itself(rig: Rig, trouble: Trouble) -> None:
    driver = rig.driver()
    with rig.refuse(trouble):
        with pytest.raises(CloudError) as caught:
            driver.launch(launch("t-1"))
        assert caught.value.trouble is trouble
        assert caught.value.code
        assert GROUP in str(caught.value)
        assert "# t-1" not in str(caught.value)  # user data holds a join token
    rig.settle()
    assert listed(driver) == {}
    assert len(launched(rig, driver, launch("t-2"))) == 1


def test_no_capacity_in_one_zone_leaves_the_others(rig: Rig) -> None:
    if len(rig.zones) < 2:
        rig.cannot("zones")
    driver, (poor, rich) = rig.driver(zones=list(rig.zones)), rig.zones[:2]
    with rig.refuse(Trouble.capacity, zone=poor):
        with pytest.raises(CloudError) as caught:
            driver.launch(launch("t-1", zone=poor))
        assert (caught.value.trouble, caught.value.zone) == (Trouble.capacity, poor)
        assert len(launched(rig, driver, launch("t-2", zone=rich))) == 1


def test_no_spot_capacity_leaves_the_ordinary_price(rig: Rig) -> None:
    if not rig.spot:
        rig.cannot("spot")
    driver = rig.driver(spot=True, on_demand_fallback=True)
    with rig.refuse(Trouble.capacity, purchase=Purchase.spot):
        with pytest.raises(CloudError) as caught:
            driver.launch(Launch(token="t-1", purchase=Purchase.spot))
        assert (caught.value.trouble, caught.value.purchase) == (Trouble.capacity, Purchase.spot)
        assert len(launched(rig, driver, launch("t-2"))) == 1


def test_a_list_that_cannot_be_had_is_an_error_and_not_an_empty_one(rig: Rig) -> None:
    driver = rig.driver()
    launched(rig, driver, launch("t-1"))
    with rig.refuse(Trouble.outage), pytest.raises(CloudError) as caught:
        driver.list()
    assert caught.value.trouble is Trouble.outage
    assert len(listed(driver)) == 1


def test_wrong_settings_are_told_in_words(rig: Rig) -> None:
    for word, changes in rig.wrong_settings().items():
        problems = list(rig.driver(**changes).check())
        assert any(word in problem for problem in problems), (word, problems)


def test_bad_credentials_are_told_in_words(rig: Rig) -> None:
    driver = rig.driver()
    with rig.refuse(Trouble.credentials):
        assert list(driver.check())
    assert list(driver.check()) == []
