"""Who tries a step again after its client died joins the execution that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service, static_settings
from valohai_agent import protocol as p
from valohai_dagster.executions.rejoin import execution_to_rejoin
from valohai_dagster.executions.spec_model import ExecutionSpec, InputSpec
from valohai_dagster.executions.stream import EventKind, ExecutionView
from valohai_dagster.settings import Settings

URL = "http://user:secret-word@example.org/a.csv"


@pytest.fixture
def service(settings: Settings) -> Iterator[RunningService]:
    with running_service(static_settings(settings)) as service:
        yield service


def submitted(service: RunningService, **values: Any) -> ExecutionSpec:
    spec = make_spec(inputs=[InputSpec(name="data", uris=[URL])], **values)
    service.client.submit(spec)
    service.events(spec.execution_id, lambda e: e.kind is EventKind.snapshot)
    return spec


def another_try(spec: ExecutionSpec, **values: Any) -> ExecutionSpec:
    return make_spec(
        **{**dict(spec), "execution_id": make_spec().execution_id, "retry_number": 1, **values}
    )


def found(service: RunningService, spec: ExecutionSpec, *parents: str) -> str | None:
    with service.records.read() as conn:
        return execution_to_rejoin(conn, spec, parents)


def test_a_retry_of_the_step_joins_the_execution_that_goes_on(service: RunningService):
    first = submitted(service)
    assert found(service, another_try(first)) == first.execution_id


def test_a_retry_of_the_run_joins_it_too(service: RunningService):
    first = submitted(service)
    again = another_try(first, run_id="another-run")
    assert found(service, again) is None
    assert found(service, again, first.run_id or "") == first.execution_id


@pytest.mark.parametrize(
    "change", [{"commands": ["other"]}, {"step_key": "other"}, {"instance_id": "other"}]
)
def test_other_work_is_never_joined(service: RunningService, change: dict[str, Any]):
    first = submitted(service)
    assert found(service, another_try(first, **change)) is None


def test_a_failed_execution_is_not_joined_and_a_complete_one_only_in_its_own_run(
    service: RunningService, redis_server: RedisServer
):
    agent = service.agent(redis_server)
    for outcome, expected in ((p.Outcome.error, False), (p.Outcome.complete, True)):
        first = submitted(service)
        lease = agent.take()
        lease.leased()
        lease.wait_grants()
        lease.finish(outcome)
        service.final(first.execution_id)
        assert (found(service, another_try(first)) == first.execution_id) is expected
        assert found(service, another_try(first, run_id="x"), first.run_id or "") is None


def test_the_joined_execution_belongs_to_the_new_try_and_ends_once(
    service: RunningService, redis_server: RedisServer
):
    first = submitted(service, log_key=["run", "compute_logs", "old"])
    again = another_try(
        first, execution_id=first.execution_id, log_key=["run", "compute_logs", "new"]
    )
    service.client.submit(again)
    agent = service.agent(redis_server)
    lease = agent.take()
    lease.leased()
    lease.wait_grants()
    lease.finish()
    view = ExecutionView.model_validate(service.final(first.execution_id).data)
    assert view.counter == 1
    assert agent.try_take() is None
