"""The simulated fleet is a worker like any other: what benchmarks count with it is what real agents would do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fleet.process import FleetProcess
from tests.support.fleet.profile import Profile
from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service, static_settings
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.settings import Settings

NUMBER = 12


@pytest.fixture
def service(own_redis: RedisServer, tmp_path: Path) -> Iterator[RunningService]:
    settings = Settings(state_dir=tmp_path / "state", redis_url=own_redis.unix_url)
    with running_service(static_settings(settings)) as service:
        yield service


def fleet(service: RunningService, server: RedisServer, tmp_path: Path, profile: Profile):
    return FleetProcess(
        server.unix_url,
        service.keys.deployment,
        profile,
        log=tmp_path / "fleet.log",
        trace=tmp_path / "trace.jsonl",
    )


def submit(service: RunningService, number: int = NUMBER) -> list[str]:
    specs = [make_spec() for _ in range(number)]
    for spec in specs:
        service.client.submit(spec)
    return [spec.execution_id for spec in specs]


def view(service: RunningService, execution_id: str) -> ExecutionView:
    found = service.client.view(execution_id)
    assert found is not None
    return found


def all_ended(service: RunningService, ids: list[str]) -> bool:
    return all(view(service, one).status.final for one in ids)


def test_it_plays_executions_to_their_end_with_outputs_metrics_and_logs(
    service: RunningService, own_redis: RedisServer, tmp_path: Path
) -> None:
    with fleet(service, own_redis, tmp_path, Profile(slots=5, agents=2, outputs=2)) as players:
        ids = submit(service)
        players.wait_for("finished", NUMBER, seconds=60)
        wait_for(lambda: all_ended(service, ids), seconds=20, what="all ends")
        kinds = [line["k"] for line in players.reports()]
    for one in ids:
        ended = view(service, one)
        assert ended.status is ExecutionStatus.complete
        assert sorted(output.name for output in ended.outputs) == ["part-0.bin", "part-1.bin"]
        assert ended.latest_metadata["loss"] == 1
        assert ended.attempt == 1
    assert kinds.count("leased") == kinds.count("finished") == NUMBER


def test_which_executions_fail_is_known_beforehand(
    service: RunningService, own_redis: RedisServer, tmp_path: Path
) -> None:
    profile = Profile(slots=NUMBER, fail_share=0.5, seed=3)
    with fleet(service, own_redis, tmp_path, profile) as players:
        ids = submit(service)
        players.wait_for("finished", NUMBER, seconds=60)
        wait_for(lambda: all_ended(service, ids), seconds=20, what="all ends")
    failed = {one for one in ids if view(service, one).status is ExecutionStatus.error}
    assert failed == {one for one in ids if profile.fails(one)}


def test_held_commands_run_until_told_or_stopped(
    service: RunningService, own_redis: RedisServer, tmp_path: Path
) -> None:
    with fleet(service, own_redis, tmp_path, Profile(slots=NUMBER, hold=True)) as players:
        stopped, *ids = submit(service)

        def all_run() -> bool:
            return players.stats()["phases"].get("running") == NUMBER

        wait_for(all_run, seconds=60, every=0.1, what="all to run")
        service.client.stop(stopped)
        assert service.final(stopped).data["status"] == ExecutionStatus.stopped.value
        assert players.stats().get("finished", 0) == 0
        players.let_end()
        wait_for(lambda: all_ended(service, ids), seconds=20, what="all ends")
    assert {view(service, one).status for one in ids} == {ExecutionStatus.complete}


def test_after_a_loss_of_all_data_it_tells_everything_again(
    service: RunningService, own_redis: RedisServer, tmp_path: Path
) -> None:
    with fleet(service, own_redis, tmp_path, Profile(slots=NUMBER, hold=True)) as players:
        ids = submit(service)

        def all_run() -> bool:
            return players.stats()["phases"].get("running") == NUMBER

        wait_for(all_run, seconds=60, every=0.1, what="all to run")
        own_redis.restart(empty=True)
        players.wait_for("restored", NUMBER, seconds=30)
        players.let_end()
        wait_for(lambda: all_ended(service, ids), seconds=40, what="all ends")
        counts = players.stats()
    assert counts.get("overlaps", 0) == counts.get("fenced", 0) == 0
    for one in ids:
        assert view(service, one).status is ExecutionStatus.complete
        assert view(service, one).attempt == 1
        assert len(view(service, one).outputs) == 1
