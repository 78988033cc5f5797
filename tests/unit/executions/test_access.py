"""Who may use a group, and whose turn it is."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from valohai_dagster.errors import RefusedError
from valohai_dagster.executions.access import (
    Claim,
    Launcher,
    Turns,
    launcher_of,
    require_access,
)
from valohai_dagster.settings_groups import StaticGroupSettings

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
ANN = Launcher(user="ann", teams=("vision",), organization="acme")


def group(**values: object) -> StaticGroupSettings:
    return StaticGroupSettings.model_validate({"kind": "static", **values})


def claim(number: int, user: str = "ann", *, waits: bool = True, priority: int = 0) -> Claim:
    at = NOW + timedelta(seconds=number)
    return Claim(
        id=f"e{number}", launcher=Launcher(user=user), waits=waits, priority=priority, at=at
    )


def test_who_launched_is_what_the_tags_of_the_run_say() -> None:
    tags = {
        "valohai/user": "ann",
        "valohai/team": "vision, nlp",
        "valohai/organization": "acme",
        "dagster/user": "somebody",
    }
    found = launcher_of(tags)
    assert found == Launcher(user="ann", teams=("vision", "nlp"), organization="acme")
    assert launcher_of({"dagster/user": "bob"}).user == "bob"
    assert launcher_of({}) == Launcher()


def test_e01_a_disabled_group_is_not_launchable() -> None:
    require_access("gpu", group(), Launcher())
    with pytest.raises(RefusedError, match=r"'gpu' is disabled.*groups enable gpu"):
        require_access("gpu", group(enabled=False), ANN)


@pytest.mark.parametrize("owner", ["user:ann", "team:vision", "organization:acme"])
def test_a_group_with_an_owner_is_for_them_alone(owner: str) -> None:
    require_access("gpu", group(owner=owner), ANN)
    for other in (Launcher(), Launcher(user="bob", teams=("nlp",))):
        with pytest.raises(RefusedError, match="belongs to"):
            require_access("gpu", group(owner=owner), other)


def test_l12_with_team_quotas_teams_without_one_and_teams_with_0_have_no_access() -> None:
    limited = group(team_quotas={"vision": 2, "nlp": 0})
    require_access("gpu", limited, ANN)
    require_access("gpu", limited, Launcher(teams=("nlp", "vision")))
    for teams in ((), ("nlp",), ("audio",)):
        with pytest.raises(RefusedError, match=r"for teams with a quota \(vision\)"):
            require_access("gpu", limited, Launcher(user="bob", teams=teams))


def test_l11_without_a_quota_everybody_has_as_much_as_they_want() -> None:
    turns = Turns("gpu", group(), [claim(n, waits=False) for n in range(100)])
    assert turns.take(claim(100)) is None


def test_l10_the_execution_beyond_the_quota_waits_and_the_next_users_does_not() -> None:
    turns = Turns("gpu", group(per_user_quota=2), [])
    assert turns.take(claim(1)) is None
    assert turns.take(claim(2)) is None
    told = turns.take(claim(3))
    assert told is not None
    assert "user ann has 2 of 2 executions at once (per_user_quota)" in told
    assert turns.take(claim(4, "bob")) is None


def test_l10_those_that_wait_go_first_by_priority_then_in_order() -> None:
    running = claim(0, waits=False)
    waiting = [claim(1), claim(2), claim(3, priority=1)]
    full = Turns("gpu", group(per_user_quota=1), [running, *waiting])
    assert set(full.obstacles) == {"e1", "e2", "e3"}
    freed = Turns("gpu", group(per_user_quota=1), waiting)
    assert set(freed.obstacles) == {"e1", "e2"}
    two = Turns("gpu", group(per_user_quota=2), waiting)
    assert set(two.obstacles) == {"e2"}
    assert two.take(claim(4)) is not None


def test_a_newcomer_of_higher_priority_takes_no_turn_that_was_used() -> None:
    turns = Turns("gpu", group(per_user_quota=1), [claim(1), claim(2)])
    assert turns.take(claim(1)) is None
    assert turns.take(claim(3, priority=9)) is not None


def test_l12_a_user_in_several_teams_uses_the_sum_and_shares_it_with_their_members() -> None:
    limited = group(team_quotas={"vision": 1, "nlp": 2})

    def of(number: int, *teams: str) -> Claim:
        at = NOW + timedelta(seconds=number)
        return Claim(id=f"e{number}", launcher=Launcher(teams=teams), waits=True, at=at)

    turns = Turns("gpu", limited, [])
    assert turns.take(of(1, "vision")) is None
    assert "team vision has 1 of 1" in (turns.take(of(2, "vision")) or "")
    assert turns.take(of(3, "vision", "nlp")) is None
    assert turns.take(of(4, "nlp", "vision")) is None
    assert "team nlp, vision has 3 of 3" in (turns.take(of(5, "nlp", "vision")) or "")


CLAIMS = st.lists(
    st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 2)), max_size=30
).map(
    lambda items: [
        claim(number, user, waits=waits, priority=priority)
        for number, (user, waits, priority) in enumerate(items)
    ]
)


@given(claims=CLAIMS, quota=st.integers(1, 4), later=CLAIMS)
def test_l10_taking_one_by_one_is_as_deciding_on_all_and_never_beyond_the_quota(
    claims: list[Claim], quota: int, later: list[Claim]
) -> None:
    limited = group(per_user_quota=quota)
    turns = Turns("g", limited, claims)
    queued = [one for one in claims if not one.waits]
    for number, new in enumerate(later):
        one = claim(1000 + number, new.launcher.user, priority=new.priority)
        if turns.take(one) is None:
            queued.append(one)
    for user in "abc":
        before = sum(not one.waits and one.launcher.user == user for one in claims)
        assert sum(one.launcher.user == user for one in queued) <= max(quota, before)


def test_l12_who_waits_and_has_lost_the_quota_or_the_group_is_told_so() -> None:
    waiting = Claim(id="e1", launcher=Launcher(user="bob", teams=("nlp",)), waits=True, at=NOW)
    limited = group(team_quotas={"vision": 2})
    assert "user bob (team nlp) has no quota" in Turns("gpu", limited, [waiting]).obstacles["e1"]
    disabled = group(team_quotas={"nlp": 2}, enabled=False)
    assert "gpu is disabled" in Turns("gpu", disabled, [waiting]).obstacles["e1"]


def test_quotas_are_not_negative() -> None:
    with pytest.raises(ValidationError, match="vision = -1 is negative"):
        group(team_quotas={"vision": -1})
