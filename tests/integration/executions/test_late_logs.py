"""A log store that is away when an execution ends does not cost its log."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.mortal_salvage import salvage_and_die
from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service, static_settings
from tests.support.sim_agent import SimLease
from valohai_dagster.executions import late_logs
from valohai_dagster.executions.late_logs import LateLogs
from valohai_dagster.executions.service import ExecutionService
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings


@pytest.fixture
def service(settings: Settings) -> Iterator[RunningService]:
    with running_service(static_settings(settings)) as service:
        yield service


def running(service: RunningService, server: RedisServer) -> SimLease:
    """An execution that has printed two lines."""
    service.client.submit(make_spec())
    lease = service.agent(server, "sim-1").take()
    lease.leased()
    lease.wait_grants()
    with server.client() as client:
        for stream, text in (("stdout", "epoch 1"), ("stderr", "careful")):
            at = "2026-01-01T00:00:00.000000"
            entry: dict[Any, Any] = {"s": stream, "t": at, "m": text, "o": 0, "e": 0, "g": 0}
            client.xadd(service.keys.log("local", lease.job.execution_id, 1), entry)
    return lease


def end(service: RunningService, lease: SimLease, **values: Any) -> None:
    lease.finish(**values)
    service.final(lease.job.execution_id, timeout=30)


def look(service: RunningService) -> None:
    service.call(lambda s: s.late_logs.look())


def logs_of(service: RunningService, lease: SimLease) -> dict[str, Any]:
    mine = t.attempts.c.execution_id == lease.job.execution_id
    with service.records.read() as conn:
        return conn.execute(sa.select(t.attempts.c.logs).where(mine)).scalar_one()


def content(service: RunningService, log: dict[str, Any]) -> bytes:
    assert service.service is not None
    with service.service.stores[log["store"]].open(log["key"]) as file:
        return file.read()


def blocked(service: RunningService) -> Path:
    """Something in the log store's way, until it is removed."""
    assert service.service is not None
    root = Path(service.service.stores["local"].root)  # type: ignore[attr-defined]
    root.mkdir(parents=True, exist_ok=True)
    (root / "logs").write_text("no directory")
    return root / "logs"


def test_the_live_log_is_stored_when_the_agent_could_not_store_its_own(
    service: RunningService, redis_server: RedisServer
) -> None:
    lease = running(service, redis_server)
    end(service, lease)
    look(service)
    logs = logs_of(service, lease)
    assert content(service, logs["stdout"]) == b"epoch 1\n"
    assert content(service, logs["stderr"]) == b"careful\n"
    assert b'"careful"' in gzip.decompress(content(service, logs["events"]))
    assert {log["complete"] for log in logs.values()} == {False}


def test_it_is_tried_again_until_the_store_is_back_also_by_the_next_conductor(
    service: RunningService, redis_server: RedisServer
) -> None:
    obstacle = blocked(service)
    lease = running(service, redis_server)
    end(service, lease)
    look(service)
    look(service)
    assert logs_of(service, lease) == {}
    service.leave()
    obstacle.unlink()
    service.start()
    deadline = time.monotonic() + 60
    while not logs_of(service, lease):  # once it has the shards
        assert time.monotonic() < deadline
        look(service)
    assert logs_of(service, lease).keys() == {"stdout", "stderr", "events"}


def test_what_the_agent_has_stored_stays_and_only_the_rest_is_added(
    service: RunningService, redis_server: RedisServer
) -> None:
    lease = running(service, redis_server)
    stored = lease.store_log("stdout", b"epoch 1\nepoch 2\n")
    end(service, lease, logs=[stored])
    before = logs_of(service, lease)
    look(service)
    logs = logs_of(service, lease)
    assert logs["stdout"] == before["stdout"]
    assert content(service, logs["stdout"]) == b"epoch 1\nepoch 2\n"
    assert (logs["stdout"]["complete"], logs["stderr"]["complete"]) == (True, False)
    look(service)
    assert logs_of(service, lease) == logs


def test_files_of_an_agent_on_this_host_are_complete(
    service: RunningService, redis_server: RedisServer, tmp_path: Path
) -> None:
    class Group:
        def attempt_logs(self, execution_id: str, attempt: int) -> Path:
            assert (execution_id, attempt) == (lease.job.execution_id, 1)
            return tmp_path / "kept"

    lease = running(service, redis_server)
    (tmp_path / "kept").mkdir()
    for name in ("stdout", "stderr", "events"):
        (tmp_path / "kept" / name).write_text(f"all of {name}\n")
    obstacle = blocked(service)
    end(service, lease)
    obstacle.unlink()
    service.call(lambda s: LateLogs(s, s.shards, {"local": Group()}).look())
    logs = logs_of(service, lease)
    assert content(service, logs["stdout"]) == b"all of stdout\n"
    assert {log["complete"] for log in logs.values()} == {True}


def test_an_attempt_without_any_log_is_left_alone(
    service: RunningService, redis_server: RedisServer
) -> None:
    lease = running(service, redis_server)
    with redis_server.client() as client:
        client.delete(service.keys.log("local", lease.job.execution_id, 1))
    end(service, lease)
    look(service)
    assert logs_of(service, lease) == {}


def stored(service: RunningService) -> list[str]:
    """Keys of all logs in the store."""
    assert service.service is not None
    return sorted(item.key for item in service.service.stores["local"].list("logs/"))


def noted(service: RunningService) -> list[str]:
    with service.records.read() as conn:
        return sorted(conn.execute(sa.select(t.uploads.c.key)).scalars())


def killed(service: RunningService, server: RedisServer) -> SimLease:
    """Its log is in the store, and whoever stored it was killed before it could say so."""
    obstacle = blocked(service)
    lease = running(service, server)
    end(service, lease)
    look(service)
    service.leave()
    obstacle.unlink()
    salvage_and_die(service.settings)
    service.start()
    wait_for(lambda: len(service.held) == service.records.shards, what="the shards")
    return lease


def test_the_log_of_a_killed_salvage_is_stored_by_the_next_conductor_under_the_same_key(
    service: RunningService, redis_server: RedisServer
) -> None:
    lease = killed(service, redis_server)
    look(service)
    logs = logs_of(service, lease)
    assert content(service, logs["stdout"]) == b"epoch 1\n"
    assert stored(service) == sorted(log["key"] for log in logs.values())
    assert noted(service) == []


def test_what_a_killed_salvage_has_stored_is_swept_when_nobody_comes_to_record_it(
    service: RunningService, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: Any, **values: Any) -> None:
        return None

    monkeypatch.setattr(late_logs, "salvage", gone)  # the live log has come to its end meanwhile
    killed(service, redis_server)
    (key,) = stored(service)
    assert key in noted(service)

    async def sweep(running: ExecutionService) -> None:
        now = running.clock()
        running.sweeper.clock = lambda: now + timedelta(days=2)
        while await running.sweeper.sweep():
            pass

    service.call(sweep)
    assert (stored(service), noted(service)) == ([], [])


def test_tries_that_fail_do_not_pile_up(service: RunningService, redis_server: RedisServer) -> None:
    obstacle = blocked(service)
    lease = running(service, redis_server)
    end(service, lease)
    for _ in range(3):
        look(service)
    assert len(noted(service)) == 3
    obstacle.unlink()
    look(service)
    assert logs_of(service, lease).keys() == {"stdout", "stderr", "events"}
    assert noted(service) == []
