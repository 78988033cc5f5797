"""A running execution service for tests: real records, real Redis, its loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest

from tests.support.redis_server import RedisServer
from tests.support.sim_agent import SimAgent
from valohai_agent.protocol import Keys
from valohai_dagster.broker.connection import broker_url, connect, connect_async
from valohai_dagster.capacity.clouds.registry import OpenDriver
from valohai_dagster.data.secrets import load_secret_key
from valohai_dagster.executions.client import ExecutionClient
from valohai_dagster.executions.service import ExecutionService
from valohai_dagster.executions.spec_model import CommitRef, ExecutionSpec, ProjectRef
from valohai_dagster.executions.stream import EventKind, FollowEvent
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import StaticGroupSettings
from valohai_dagster.stores.registry import open_stores

T = TypeVar("T")


class RunningService:
    """`start` and `kill` as often as a test likes; records and Redis stay."""

    def __init__(self, settings: Settings, *, drivers: OpenDriver | None = None) -> None:
        """`drivers` stands in for the drivers of clouds."""
        self.settings = settings
        self._drivers = drivers
        self.records: Records = open_records(settings)
        self.keys = Keys(self.records.deployment_id)
        self.client = ExecutionClient(settings, connect(settings), self.records, self.keys)
        self.service: ExecutionService | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> RunningService:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    async def _main(self, ready: threading.Event) -> None:
        broker = await connect_async(self.settings)
        self.service = ExecutionService(
            self.settings,
            records=self.records,
            broker=broker,
            broker_url=broker_url(self.settings),
            stores=open_stores(self.settings),
            secret_key=load_secret_key(self.settings),
            drivers=self._drivers,
        )
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._serve(self.service))
        ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await broker.aclose()

    async def _serve(self, service: ExecutionService) -> None:
        await service.run()

    def kill(self) -> None:
        """Ends the service without a word to anyone; its leases are left to end by themselves."""
        if self.service is not None:
            self.service.shards.release_all = _nothing
        self.leave()

    def leave(self) -> None:
        """Ends the service in order."""
        if self._loop is not None and self._task is not None and self._thread is not None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join(20)
            assert not self._thread.is_alive(), "the service does not end"
        self._thread = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Its event loop stands still meanwhile, as after SIGSTOP; what it has asked for may still be answered."""
        assert self._loop is not None
        paused, resumed = threading.Event(), threading.Event()

        def pause() -> None:
            paused.set()
            resumed.wait()

        self._loop.call_soon_threadsafe(pause)
        assert paused.wait(10)
        try:
            yield
        finally:
            resumed.set()

    @property
    def held(self) -> frozenset[int]:
        """The shards that it looks after."""
        return self.service.shards.held if self.service is not None else frozenset()

    def close(self) -> None:
        self.leave()
        self.records.close()

    def call(self, *parts: Callable[[ExecutionService], Awaitable[None]]) -> None:
        """Runs these on the service's own loop, all at once."""
        assert self.service is not None
        assert self._loop is not None
        service = self.service

        async def together() -> None:
            await asyncio.gather(*(part(service) for part in parts))

        asyncio.run_coroutine_threadsafe(together(), self._loop).result(10)

    def agent(self, redis_server: RedisServer, name: str = "sim-1") -> SimAgent:
        return SimAgent(redis_server.client(), self.keys, name=name)

    def events(
        self, execution_id: str, until: Callable[[FollowEvent], bool], timeout: float = 10.0
    ) -> list[FollowEvent]:
        """What a follower sees from the start up to the first event that `until` accepts."""
        seen: list[FollowEvent] = []
        deadline = time.monotonic() + timeout
        for event in self.client.follow(execution_id):
            if event is not None:
                seen.append(event)
                if until(event):
                    return seen
            assert time.monotonic() < deadline, f"waited in vain; seen: {[e.message for e in seen]}"
        return seen

    def final(self, execution_id: str, timeout: float = 15.0) -> FollowEvent:
        return self.events(execution_id, lambda e: e.kind is EventKind.final, timeout)[-1]


LEASE_SECONDS = 2.5  # of a shard, once shortened


def shorten_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody has to wait a quarter of a minute for a dead conductor's shards."""
    for module in ("share_out", "shards"):
        monkeypatch.setattr(f"valohai_dagster.executions.{module}.LEASE_SECONDS", LEASE_SECONDS)
    monkeypatch.setattr("valohai_dagster.executions.share_out.MARGIN_SECONDS", 1.0)
    monkeypatch.setattr("valohai_dagster.executions.shards.RENEW_SECONDS", 0.5)


async def _nothing() -> None:
    """Stands in for an orderly end."""


@contextlib.contextmanager
def running_service(
    settings: Settings, *, drivers: OpenDriver | None = None
) -> Iterator[RunningService]:
    service = RunningService(settings, drivers=drivers).start()
    try:
        yield service
    finally:
        service.close()


def static_settings(settings: Settings, **values: Any) -> Settings:
    """The same deployment with a group `local` whose agents the test plays itself."""
    data = {
        **settings.model_dump(),
        "groups": {"local": StaticGroupSettings(kind="static")},
        **values,
    }
    return Settings(**data)


def make_spec(**values: Any) -> ExecutionSpec:
    """A small valid spec; the code archive is named but not needed by simulated agents."""
    defaults: dict[str, Any] = {
        "execution_id": str(uuid.uuid4()),
        "run_id": str(uuid.uuid4()),
        "step_key": "digits__train",
        "project": ProjectRef(name="digits"),
        "commit": CommitRef(
            identifier="~" + "a" * 64,
            adhoc=True,
            archive_store="local",
            archive_key="commits/digits/a.tar.gz",
            archive_sha256="a" * 64,
        ),
        "step": "train",
        "image": "python:3.11",
        "commands": ["python train.py"],
    }
    return ExecutionSpec(**{**defaults, **values})
