"""How many agents a local group has (E-05)."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from valohai_dagster.capacity.agent_planner import AgentSeen, GroupPolicy, plan

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
POLICY = GroupPolicy(max_agents=3, slots=2, grace=timedelta(seconds=60))


def agent(name: str = "a", **changes: object) -> AgentSeen:
    values = {"name": name, "launched_at": NOW, "checked_in": True, "slots": 2, **changes}
    return AgentSeen(**values)


def test_work_without_agents_starts_enough_of_them():
    assert plan(waiting=3, agents=[], policy=POLICY, now=NOW).start == 2


def test_an_agent_that_was_just_launched_counts_before_it_checks_in():
    pending = agent(checked_in=False)
    assert plan(waiting=2, agents=[pending], policy=POLICY, now=NOW).start == 0


def test_an_agent_that_never_checked_in_stops_counting_after_its_boot_time():
    late = agent(checked_in=False, launched_at=NOW - timedelta(minutes=5))
    assert plan(waiting=1, agents=[late], policy=POLICY, now=NOW).start == 1


def test_the_maximum_holds_whatever_waits():
    busy = [agent("a", busy=2), agent("b", busy=2)]
    assert plan(waiting=50, agents=busy, policy=POLICY, now=NOW).start == 1


def test_an_idle_agent_goes_after_the_grace_and_not_before():
    since = NOW - timedelta(seconds=60)
    assert plan(waiting=0, agents=[agent(idle_since=since)], policy=POLICY, now=NOW).drain == ("a",)
    assert plan(waiting=0, agents=[agent(idle_since=NOW)], policy=POLICY, now=NOW).drain == ()


agents = st.lists(
    st.builds(
        AgentSeen,
        name=st.text("abc", min_size=1, max_size=3),
        launched_at=st.sampled_from([NOW, NOW - timedelta(hours=1)]),
        checked_in=st.booleans(),
        slots=st.integers(1, 4),
        busy=st.integers(0, 4),
        draining=st.booleans(),
        idle_since=st.sampled_from([None, NOW, NOW - timedelta(hours=1)]),
    ),
    max_size=5,
    unique_by=lambda a: a.name,
)


@given(waiting=st.integers(0, 100), seen=agents)
def test_a_busy_agent_is_never_drained_and_the_maximum_never_passed(
    waiting: int, seen: list[AgentSeen]
):
    decision = plan(waiting=waiting, agents=seen, policy=POLICY, now=NOW)
    busy = {a.name for a in seen if a.busy}
    assert not busy & set(decision.drain)
    assert decision.start == 0 or len(seen) + decision.start <= POLICY.max_agents
    assert len(decision.reasons) == len(decision.drain) + bool(decision.start)
