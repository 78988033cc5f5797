"""Executions whose inputs lie in stores behind a network: slow ones, broken ones, stops and restarts meanwhile.

The store is a directory that says it is an S3 bucket, so that a test decides when and what it answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, static_settings
from valohai_agent import protocol as p
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.survey import Pattern
from valohai_dagster.errors import StoreUnavailable
from valohai_dagster.executions.service import ExecutionService
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView, FollowEvent
from valohai_dagster.settings import Settings
from valohai_dagster.stores.base import ObjectStat
from valohai_dagster.stores.local import LocalStore
from valohai_dagster.stores.registry import Stores, open_stores


class FarStore(LocalStore):
    kind = "s3"

    def __init__(self, root: Path) -> None:
        super().__init__("far", root)
        self.gate = threading.Event()
        self.asked: list[str] = []
        self.down = False
        self.versions: dict[str, str] = {}

    def uri(self, key: str) -> str:
        return f"s3://far/{key}"

    def key_of(self, uri: str) -> str | None:
        return uri.removeprefix("s3://far/") if uri.startswith("s3://far/") else None

    def stat(self, key: str) -> ObjectStat | None:
        found = super().stat(key)
        return found and ObjectStat(
            key=key,
            size=found.size,
            version=self.versions.get(key, found.version),
            mtime=found.mtime,
        )

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        self.asked.append(prefix)
        assert self.gate.wait(30)
        if self.down:
            raise StoreUnavailable("the store 'far' cannot be reached", store="far")
        return super().list(prefix)


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FarStore]:
    store = FarStore(tmp_path / "far")
    for key in ("set/a", "set/b"):
        store.put(key, key.encode())

    def opened(settings: Settings) -> Stores:
        known = open_stores(settings)
        return Stores({**{name: known[name] for name in known}, "far": store}, default="local")

    monkeypatch.setattr("tests.support.service.open_stores", opened)
    yield store
    store.gate.set()


@pytest.fixture
def service(settings: Settings, far: FarStore) -> Iterator[RunningService]:
    service = RunningService(static_settings(settings)).start()
    yield service
    far.gate.set()
    service.close()


def submit(service: RunningService, *uris: str) -> str:
    spec = make_spec(inputs=[InputSpec(name="data", uris=list(uris))] if uris else [])
    service.client.submit(spec)
    return spec.execution_id


def asked(far: FarStore, times: int = 1) -> None:
    wait_for(lambda: len(far.asked) >= times, seconds=10, what="a question to the store")


def view_of(event: FollowEvent) -> ExecutionView:
    return ExecutionView.model_validate(event.data)


def kinds(*wanted: EventKind) -> Callable[[FollowEvent], bool]:
    return lambda event: event.kind in wanted


def test_a_slow_store_holds_up_nobody_else(
    service: RunningService, far: FarStore, redis_server: RedisServer
) -> None:
    slow = submit(service, "s3://far/set/*")
    asked(far)
    (first,) = service.events(slow, kinds(EventKind.snapshot))
    assert view_of(first).status is ExecutionStatus.created
    quick = submit(service)
    agent = service.agent(redis_server)
    assert agent.take().job.execution_id == quick
    far.gate.set()
    lease = agent.take()
    assert lease.job.execution_id == slow
    (item,) = lease.job.inputs
    assert [file.uri for file in item.files] == ["s3://far/set/a", "s3://far/set/b"]
    assert all((file.cache_key or "").startswith(f"{file.uri}@") for file in item.files)
    told = service.events(slow, lambda event: event.data.get("status") == "queued")
    assert [event.data.get("status") for event in told] == ["created", "queued"]


def test_i03_executions_that_wait_for_the_same_are_answered_together(
    service: RunningService, far: FarStore
) -> None:
    far.gate.set()
    answers: list[object] = []

    async def ask(running: ExecutionService) -> None:
        answers.append(await running.surveys.ask(Pattern(store="far", key="set/*")))

    service.call(ask, ask, ask)
    assert far.asked == ["set/"]
    assert answers[0] is answers[1] is answers[2]
    service.call(ask)
    assert far.asked == ["set/", "set/"], "later ones see what is there then"


def test_i38_a_store_that_is_down_refuses_the_execution_with_its_message(
    service: RunningService, far: FarStore
) -> None:
    far.down = True
    far.gate.set()
    view = view_of(service.final(submit(service, "s3://far/set/*")))
    assert view.status is ExecutionStatus.error
    assert "s3://far/set/*: the store 'far' cannot be reached" in str(view.reason)


def test_a_store_that_does_not_answer_in_time_refuses_the_execution(
    service: RunningService, far: FarStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("valohai_dagster.executions.surveys.ANSWER_SECONDS", 0.05)
    view = view_of(service.final(submit(service, "s3://far/set/*")))
    assert "the store 'far' has not answered within" in str(view.reason)


def test_an_execution_that_waits_for_a_store_can_be_stopped(
    service: RunningService, far: FarStore, redis_server: RedisServer
) -> None:
    execution_id = submit(service, "s3://far/set/*")
    asked(far)
    service.client.stop(execution_id, hard=False, reason="changed my mind")
    view = view_of(service.final(execution_id))
    assert view.status is ExecutionStatus.stopped
    assert view.reason == "changed my mind"
    far.gate.set()
    submit(service)
    agent = service.agent(redis_server)
    assert agent.take().job.execution_id != execution_id


def test_another_conductor_asks_again(
    service: RunningService, far: FarStore, redis_server: RedisServer
) -> None:
    execution_id = submit(service, "s3://far/set/*")
    asked(far)
    service.leave()
    service.start()
    asked(far, 2)
    far.gate.set()
    assert service.agent(redis_server).take().job.execution_id == execution_id


def test_i32_an_object_of_another_version_is_a_warning_at_creation(
    service: RunningService, far: FarStore, redis_server: RedisServer
) -> None:
    agent = service.agent(redis_server)
    warnings = []
    for version in ("v1", "v1", "v2"):
        far.versions["set/a"] = version
        execution_id = submit(service, "s3://far/set/a")
        lease = agent.take()
        lease.leased()
        lease.finish(p.Outcome.complete)
        view = view_of(service.final(execution_id))
        events = service.events(execution_id, kinds(EventKind.final))
        told = [event.message for event in events if event.kind is EventKind.warning]
        assert told == view.warnings == lease.job.notices
        warnings.append(view.warnings)
    assert warnings[:2] == [[], []]
    (warning,) = warnings[2]
    assert "s3://far/set/a has changed since it was last used" in warning
    assert "its version is v2, was v1" in warning


def test_i32_other_content_is_a_warning_when_a_worker_has_it(
    service: RunningService, far: FarStore, redis_server: RedisServer
) -> None:
    agent = service.agent(redis_server)
    warnings = []
    for content in ("a" * 64, "a" * 64, "b" * 64):
        execution_id = submit(service, "https://example.com/data.csv")
        lease = agent.take()
        lease.leased()
        ready = p.InputReady(
            input="data",
            file_id=lease.job.inputs[0].files[0].id,
            name="data.csv",
            size=3,
            checksums=p.Checksums(sha256=content),
        )
        lease.report(ready)
        lease.finish(p.Outcome.complete)
        view = view_of(service.final(execution_id))
        events = service.events(execution_id, kinds(EventKind.final))
        assert [e.message for e in events if e.kind is EventKind.warning] == view.warnings
        warnings.append(view.warnings)
    assert warnings[:2] == [[], []]
    (warning,) = warnings[2]
    assert "the content of https://example.com/data.csv differs from its last use" in warning
    assert "b" * 64 in warning
