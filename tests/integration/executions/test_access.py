"""Groups that are for some people, and only for so much at once: through the real service, records and Redis."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service, static_settings
from valohai_agent import protocol as p
from valohai_agent.protocol import utcnow
from valohai_dagster.capacity.overrides import write_overrides
from valohai_dagster.executions import ledger
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import StaticGroupSettings

Serve = Callable[..., RunningService]


def with_group(settings: Settings, **values: object) -> Settings:
    group = StaticGroupSettings.model_validate({"kind": "static", **values})
    return static_settings(settings, groups={"local": group})


@pytest.fixture
def serve(settings: Settings) -> Iterator[Serve]:
    services: list[RunningService] = []

    def start(**values: object) -> RunningService:
        services.append(RunningService(with_group(settings, **values)).start())
        return services[-1]

    yield start
    for service in services:
        service.close()


RUN = "7a2b2a0c-1d0e-4a7c-9a55-0d5a3e1f7c11"


def submit(service: RunningService, user: str = "ann", **values: object) -> str:
    """All of one run, so that one conductor takes them in this order."""
    spec = make_spec(**{"creator": user, "run_id": RUN, **values})
    service.client.submit(spec)
    return spec.execution_id


def view_of(service: RunningService, execution_id: str) -> ExecutionView | None:
    return service.client.view(execution_id)


def told(service: RunningService, execution_id: str, status: str) -> str:
    """What its followers were told last when they heard that it has this status."""
    events = service.events(
        execution_id,
        lambda e: e.kind is EventKind.state and e.data.get("status") == status,
    )
    return events[-1].message or ""


def test_l10_what_is_beyond_the_users_quota_waits_in_order_and_nothing_is_lost(
    serve: Serve, redis_server: RedisServer
) -> None:
    service = serve(per_user_quota=1)
    mine = [submit(service) for _ in range(3)]
    assert "user ann has 1 of 1 executions at once (per_user_quota)" in told(
        service, mine[1], "created"
    )
    told(service, mine[2], "created")
    other = submit(service, "bob")
    agent = service.agent(redis_server)
    leases = [agent.take(), agent.take()]
    assert [lease.job.execution_id for lease in leases] == [mine[0], other]
    assert agent.try_take() is None
    for expected in (mine[1], mine[2]):
        leases[0].leased()
        leases[0].finish(p.Outcome.complete)
        service.final(leases[0].job.execution_id)
        leases[0] = agent.take()
        assert leases[0].job.execution_id == expected
    view = view_of(service, mine[2])
    assert view is not None
    assert view.reason is None, "why it has waited is over"


def test_l10_the_reason_is_kept_and_another_conductor_goes_on(
    serve: Serve, redis_server: RedisServer
) -> None:
    service = serve(per_user_quota=1)
    first, second = submit(service), submit(service)
    told(service, second, "created")
    view = view_of(service, second)
    assert view is not None
    assert (view.status, "waits for its turn" in str(view.reason)) == (
        ExecutionStatus.created,
        True,
    )
    service.leave()
    service.start()
    agent = service.agent(redis_server)
    lease = agent.take()
    assert lease.job.execution_id == first
    lease.leased()
    lease.finish(p.Outcome.complete)
    assert agent.take().job.execution_id == second


def test_l10_one_that_waits_for_its_turn_can_be_stopped(serve: Serve) -> None:
    service = serve(per_user_quota=1)
    submit(service)
    waiting = submit(service)
    told(service, waiting, "created")
    service.client.stop(waiting, hard=False, reason="not needed")
    view = ExecutionView.model_validate(service.final(waiting).data)
    assert (view.status, view.reason) == (ExecutionStatus.stopped, "not needed")


def test_l11_a_quota_that_is_raised_at_run_time_lets_the_next_ones_go(
    serve: Serve, redis_server: RedisServer
) -> None:
    service = serve(per_user_quota=1)
    submit(service)
    waiting = submit(service)
    told(service, waiting, "created")
    with service.records.write() as conn:
        write_overrides(conn, "local", {"per_user_quota": 2}, utcnow())
    told(service, waiting, "queued")
    agent = service.agent(redis_server)
    agent.take()
    assert agent.take().job.execution_id == waiting


def test_l12_teams_share_a_quota_and_others_are_refused(
    serve: Serve, redis_server: RedisServer
) -> None:
    service = serve(team_quotas={"vision": 1})
    submit(service, "ann", teams=["vision"])
    waiting = submit(service, "bob", teams=["vision"])
    assert "team vision has 1 of 1 executions at once" in told(service, waiting, "created")
    refused = ExecutionView.model_validate(service.final(submit(service, "eve")).data)
    assert refused.status is ExecutionStatus.error
    assert "for teams with a quota (vision)" in str(refused.reason)


def test_e01_what_is_launched_in_a_disabled_group_is_refused_in_words(serve: Serve) -> None:
    service = serve()
    with service.records.write() as conn:
        write_overrides(conn, "local", {"enabled": False}, utcnow())
    view = ExecutionView.model_validate(service.final(submit(service)).data)
    assert view.status is ExecutionStatus.error
    assert "group 'local' is disabled" in str(view.reason)


def test_a_group_with_an_owner_refuses_others_in_words(
    serve: Serve, redis_server: RedisServer
) -> None:
    service = serve(owner="user:ann")
    mine = submit(service, "ann")
    assert service.agent(redis_server).take().job.execution_id == mine
    view = ExecutionView.model_validate(service.final(submit(service, "bob")).data)
    assert "belongs to user ann, and this was launched by user bob" in str(view.reason)


def test_the_records_know_who_launched_it(serve: Serve) -> None:
    service = serve()
    execution_id = submit(service, "ann", teams=["vision", "nlp"])
    told(service, execution_id, "queued")
    with service.records.read() as conn:
        row = ledger.row_of(conn, execution_id)
    assert (row.user_name, row.team_name) == ("ann", "vision,nlp")


def test_l10_two_conductors_together_do_not_exceed_a_quota(
    settings: Settings, postgres_url: str
) -> None:
    """On PostgreSQL, where transactions run at the same time; each execution has a shard of its own."""
    values = settings.model_copy(update={"database_url": postgres_url})
    limited = with_group(values, per_user_quota=3)
    with running_service(limited) as one, running_service(limited) as two:
        wait_for(lambda: one.held and two.held, seconds=20, what="both to have shards")
        for service in (one, two) * 10:
            submit(service, run_id=str(uuid.uuid4()))
        wait_for(
            lambda: _statuses(one) == {"queued": 3, "created": 17}, seconds=20, what="3 and 17"
        )


def _statuses(service: RunningService) -> dict[str, int]:
    import sqlalchemy as sa

    from valohai_dagster.records import tables as t

    c = t.executions.c
    with service.records.read() as conn:
        query = sa.select(c.status, sa.func.count()).group_by(c.status)
        return {row[0]: row[1] for row in conn.execute(query)}
