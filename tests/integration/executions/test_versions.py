"""Datasets, models and warnings of executions: what reports ask for, and what is left at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.redis_server import RedisServer
from tests.support.service import (
    RunningService,
    make_spec,
    running_service,
    shorten_leases,
    static_settings,
)
from tests.support.sim_agent import SimLease
from valohai_agent import protocol as p
from valohai_dagster.data import datasets, models
from valohai_dagster.executions.ledger import ensure_project
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView
from valohai_dagster.settings import Settings

DATASET = "valohai.dataset-versions"
MODEL = "valohai.model-versions"


@pytest.fixture
def service(settings: Settings) -> Iterator[RunningService]:
    with running_service(static_settings(settings)) as service:
        yield service


def begin(
    service: RunningService, redis_server: RedisServer, name: str = "sim-1", **spec: Any
) -> SimLease:
    service.client.submit(make_spec(**spec))
    lease = service.agent(redis_server, name).take()
    lease.leased()
    lease.wait_grants()
    return lease


def end(service: RunningService, lease: SimLease, outcome: p.Outcome) -> ExecutionView:
    lease.finish(outcome)
    return ExecutionView.model_validate(service.final(lease.job.execution_id).data)


def files(service: RunningService, uri: str) -> list[str]:
    with service.records.write() as conn:
        project = ensure_project(conn, "digits", service.service.clock())  # type: ignore[union-attr]
        version = datasets.get_version(conn, uri, project_id=project)
        return [datum.name for datum in datasets.files_of(conn, version.id)]


@pytest.mark.parametrize("outcome", [p.Outcome.complete, p.Outcome.error, p.Outcome.stopped])
def test_o11_a_version_is_closed_whatever_the_end(
    service: RunningService, redis_server: RedisServer, outcome: p.Outcome
) -> None:
    lease = begin(service, redis_server)
    lease.store("a", b"1", **{DATASET: ["dataset://faces/v1"], MODEL: ["model://net/"]})
    lease.store("b", b"2", **{DATASET: ["dataset://faces/v1"]})
    view = end(service, lease, outcome)
    assert view.status.value == outcome.value
    assert view.warnings == []
    assert files(service, "dataset://faces/v1") == ["a", "b"]
    with service.records.read() as conn:
        version = models.get_version(conn, "model://net/1", project_id=view.project_id)
        assert version.status == models.PENDING
        assert [d.name for d in models.files_of(conn, version.id)] == ["a"]
    events = service.events(view.id, lambda e: e.kind is EventKind.final)
    told = [event.message for event in events if event.message.startswith("made ")]
    assert told == [
        "made dataset://faces/v1 of 2 files",
        "made model://net/1 of 1 file; it waits for approval",
    ]


def test_o11_adding_to_a_closed_version_is_a_warning_of_the_execution_told_once(
    service: RunningService, redis_server: RedisServer
) -> None:
    first = begin(service, redis_server)
    first.store("a", b"1", **{DATASET: ["dataset://faces/v1"]})
    end(service, first, p.Outcome.complete)
    second = begin(service, redis_server, "sim-2")
    for name in ("b", "c"):
        second.store(name, b"2", **{DATASET: ["dataset://faces/v1"]})
    view = end(service, second, p.Outcome.complete)
    assert view.status is ExecutionStatus.complete
    assert [output.name for output in view.outputs] == ["b", "c"]
    (warning,) = view.warnings
    assert f"dataset://faces/v1 was made by execution {first.job.execution_id}" in warning
    told = [
        event.message
        for event in service.events(view.id, lambda e: e.kind is EventKind.final)
        if event.kind is EventKind.warning
    ]
    assert told == [warning]
    assert files(service, "dataset://faces/v1") == ["a"]


def test_o11_another_conductor_closes_what_was_begun(
    service: RunningService, redis_server: RedisServer
) -> None:
    lease = begin(service, redis_server)
    lease.store("a", b"1", **{DATASET: [{"uri": "dataset://d/v", "targeting_aliases": ["best"]}]})
    service.leave()
    service.start()
    lease.store("b", b"2", **{DATASET: ["dataset://d/v"]})
    end(service, lease, p.Outcome.complete)
    assert files(service, "dataset://d/best") == ["a", "b"]


def test_files_of_a_lost_attempt_are_in_no_version(
    settings: Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_leases(monkeypatch)
    with running_service(static_settings(settings, lost_grace_seconds=0)) as service:
        lease = begin(service, redis_server)
        lost = lease.store("a", b"1", **{DATASET: ["dataset://d/v"], MODEL: ["model://m/"]})
        lease.agent.redis.delete(lease.agent.keys.lease("local", lease.job.execution_id))
        again = service.agent(redis_server, "sim-2").take(timeout=20)
        again.leased()
        again.wait_grants()
        kept = again.store("a", b"1", **{DATASET: ["dataset://d/v"]})
        view = end(service, again, p.Outcome.complete)
        assert view.attempt == 2
        with service.records.read() as conn:
            version = datasets.get_version(conn, "dataset://d/v", project_id=view.project_id)
            assert [d.id for d in datasets.files_of(conn, version.id)] == [kept] != [lost]
            model = models.get_model(conn, view.project_id, "m")
            assert models.list_versions(conn, model.id) == []
