"""A log that is followed from its first live line over the end of the execution into the stored file: every byte once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import redis

from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service, static_settings
from tests.support.sim_agent import SimLease
from valohai_agent import protocol as p
from valohai_dagster.plugin.log_sections import Position, read_sections
from valohai_dagster.plugin.log_source import ServiceLogs
from valohai_dagster.settings import Settings

Stream = Literal["stdout", "stderr"]


class Follower:
    """Reads all the time, as an open view does, in a thread of its own."""

    def __init__(self, settings: Settings, execution_id: str) -> None:
        self.logs = ServiceLogs(lambda: settings)
        self.stdout, self.stderr = bytearray(), bytearray()
        self.final = False
        self._execution_id, self._cursor = execution_id, str(Position())
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._ending = threading.Event()
        self._thread.start()

    def _follow(self) -> None:
        try:
            while not self.final and not self._ending.is_set():
                self.final = self._read()
        except BaseException as error:
            self._problem = error
            raise

    def _read(self) -> bool:
        index = self.logs.index_of_execution(self._execution_id)
        chunk = read_sections(index.sections, self._cursor, self.logs, 1000)
        self.stdout += chunk.stdout
        self.stderr += chunk.stderr
        self._cursor = str(chunk.position)
        return index.final and not (chunk.stdout or chunk.stderr)

    def end(self) -> None:
        """Waits until everything is read."""
        self._thread.join(60)
        assert self._problem is None, self._problem
        assert self.final

    def close(self) -> None:
        self._ending.set()
        self._thread.join(10)
        self.logs.records().close()
        if self.logs._redis is not None:
            self.logs._redis.close()


class Writer:
    """An agent's log: the whole on its disk, the lines in Redis."""

    def __init__(self, service: RunningService, lease: SimLease, client: redis.Redis) -> None:
        self.whole: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._key = service.keys.log("local", lease.job.execution_id, lease.attempt)
        self._client = client

    def write(self, count: int, *, live: bool = True) -> None:
        for n in range(count):
            texts: dict[Stream, str] = {"stdout": f"out {n} äöü€", "stderr": f"err {n}"}
            for stream, text in texts.items():
                whole = self.whole[stream]
                start = len(whole)
                whole += text.encode() + b"\n"
                line = p.LogLine(s=p.LogStream(stream), t="x", m=text, o=start, e=len(whole))
                fields: Any = line.model_dump(mode="json")
                if live:
                    self._client.xadd(self._key, fields)

    def forget(self) -> None:
        """What an emptied Redis has left of it."""
        self._client.delete(self._key)


@pytest.fixture
def service(settings: Settings) -> Iterator[RunningService]:
    with running_service(static_settings(settings, lost_grace_seconds=0.5)) as service:
        yield service


@pytest.fixture
def followed(
    service: RunningService, redis_server: RedisServer
) -> Iterator[Callable[[], tuple[SimLease, Writer, Follower]]]:
    followers: list[Follower] = []
    with redis_server.client() as client:

        def begin() -> tuple[SimLease, Writer, Follower]:
            service.client.submit(make_spec())
            lease = service.agent(redis_server).take()
            lease.leased()
            lease.wait_grants()
            followers.append(Follower(service.settings, lease.job.execution_id))
            return lease, Writer(service, lease, client), followers[-1]

        yield begin
        for follower in followers:
            follower.close()


def finish(lease: SimLease, writer: Writer) -> None:
    logs = [lease.store_log(stream, bytes(whole)) for stream, whole in writer.whole.items()]
    lease.finish(logs=logs)


def test_every_byte_once_from_the_first_live_line_into_the_stored_file(followed: Any) -> None:
    lease, writer, follower = followed()
    for _ in range(20):
        writer.write(50)
    finish(lease, writer)
    follower.end()
    assert (follower.stdout, follower.stderr) == (writer.whole["stdout"], writer.whole["stderr"])


def test_lines_that_an_emptied_redis_took_come_from_the_stored_file(followed: Any) -> None:
    """The view stands still where the lines are missing, and goes on at that byte when the file is there."""
    lease, writer, follower = followed()
    writer.write(200)
    wait_for(lambda: len(follower.stdout) > 100, seconds=20, what="the first lines")
    writer.forget()
    writer.write(100, live=False)
    writer.write(100)
    finish(lease, writer)
    follower.end()
    assert (follower.stdout, follower.stderr) == (writer.whole["stdout"], writer.whole["stderr"])


def test_a_redis_that_was_emptied_altogether(
    followed: Any, service: RunningService, redis_server: RedisServer
) -> None:
    lease, writer, follower = followed()
    writer.write(200)
    wait_for(lambda: len(follower.stdout) > 100, seconds=20, what="the first lines")
    with redis_server.client() as client:
        client.flushall()

    def restored() -> bool:
        try:
            lease.agent.heartbeat()
            return lease.renew() in ("renewed", "restored", "ok")
        except redis.RedisError:
            return False

    writer.write(100)
    wait_for(restored, seconds=60, what="the lease")
    finish(lease, writer)
    follower.end()
    assert (follower.stdout, follower.stderr) == (writer.whole["stdout"], writer.whole["stderr"])


def test_an_agent_that_dies_leaves_what_was_live(
    followed: Any, service: RunningService, redis_server: RedisServer
) -> None:
    """Its attempt's section is complete and is followed by the next attempt's."""
    lease, writer, follower = followed()
    writer.write(300)
    lose(service, redis_server, lease)
    second = service.agent(redis_server, "sim-2").take(timeout=30)
    second.leased()
    second.wait_grants()
    second.finish()
    follower.end()
    first, _, rest = bytes(follower.stdout).partition(b"[valohai] ----")
    assert first == writer.whole["stdout"]
    assert b"attempt 2" in rest


def test_an_agent_that_dies_after_redis_was_emptied_leaves_the_rest_at_its_place(
    followed: Any, service: RunningService, redis_server: RedisServer
) -> None:
    """What is there comes once, at its place; whoever reads anew is told what is lost."""
    lease, writer, follower = followed()
    writer.write(100)
    seen = bytes(writer.whole["stdout"])
    wait_for(lambda: len(follower.stdout) == len(seen), seconds=20, what="the first lines")
    writer.forget()
    writer.write(50, live=False)
    kept = len(writer.whole["stdout"])
    writer.write(50)
    lose(service, redis_server, lease)
    second = service.agent(redis_server, "sim-2").take(timeout=30)
    second.leased()
    second.wait_grants()
    second.finish()
    follower.end()
    first = bytes(follower.stdout).partition(b"[valohai] ----")[0]
    rest = bytes(writer.whole["stdout"][kept:])
    assert first == seen + rest
    index = follower.logs.index_of_execution(lease.job.execution_id)
    anew = read_sections(index.sections[:1], None, follower.logs, None).stdout
    assert anew == b"[valohai] ... %d bytes are lost ...\n" % kept + rest


def lose(service: RunningService, server: RedisServer, lease: SimLease) -> None:
    """What the server does by itself thirty seconds after the last renewal."""
    with server.client() as client:
        client.delete(service.keys.lease("local", lease.job.execution_id))
