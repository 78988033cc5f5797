"""The autoscaling sensor: its ticks tell what was decided and why, each thing once, and have the machines looked at."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import dagster as dg
import pytest

from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service
from tests.support.small_cloud import SmallCloud, until
from valohai_dagster import valohai_autoscaling_sensor
from valohai_dagster.capacity.clouds.base import Trouble
from valohai_dagster.capacity.reading import history
from valohai_dagster.executions.capacity_state import read_state
from valohai_dagster.records.capacity_tables import capacity_events
from valohai_dagster.settings import load_settings

TOML = 'default_group = "cloud"\n[groups.cloud]\nkind = "simulated"\n[groups.local]\n'


@pytest.fixture
def cloud() -> SmallCloud:
    return SmallCloud()


@pytest.fixture
def service(
    redis_server: RedisServer, cloud: SmallCloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[RunningService]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALOHAI_REDIS_URL", redis_server.unix_url)
    Path("valohai.toml").write_text(TOML)
    with running_service(load_settings(), drivers=cloud.open) as service:
        yield service


def tick(cursor: str | None = None) -> tuple[str, str | None]:
    """What the list of ticks shows, and the new cursor."""
    with (
        dg.DagsterInstance.ephemeral() as instance,
        dg.build_sensor_context(instance=instance, cursor=cursor) as context,
    ):
        found = valohai_autoscaling_sensor().evaluate_tick(context)
    assert not found.run_requests
    return found.skip_message or "", found.cursor


def decided(service: RunningService) -> int:
    with service.records.read() as conn:
        return len([line for line in history(conn) if line.kind == "decision"])


def test_a_tick_tells_each_decision_with_its_reason_and_only_once(
    service: RunningService, cloud: SmallCloud
):
    text, cursor = tick()
    service.client.submit(make_spec())
    until(lambda: cloud.machines and decided(service))
    text, cursor = tick(cursor)
    assert "cloud decision" in text
    assert "1 waiting" in text
    text, _ = tick(cursor)
    assert "cloud decision" not in text
    assert text.startswith("cloud: 1 waiting; machines: 1 starting")


def test_a_line_that_appears_after_later_ones_is_told_too(service: RunningService):
    def write(line: int) -> None:
        values = {"group_name": "cloud", "at": datetime.now(timezone.utc), "kind": "note"}
        with service.records.write() as conn:
            conn.execute(capacity_events.insert().values(id=line, text=f"line {line}", **values))

    write(1001)
    write(1003)
    text, cursor = tick()
    assert "line 1001" in text
    assert "line 1003" in text
    write(1002)
    text, cursor = tick(cursor)
    assert "line 1002" in text
    assert "line 1001" not in text
    assert "line 1003" not in text
    text, _ = tick(cursor)
    assert "line 100" not in text


def test_a_trouble_is_told_in_words(
    service: RunningService, cloud: SmallCloud, redis_server: RedisServer
):
    cloud.no("no p4d.24xlarge is left in eu-west-1a", Trouble.capacity)
    service.client.submit(make_spec())
    with redis_server.client(decode_responses=True) as broker:
        until(lambda: (state := read_state(broker, service.keys, "cloud")) and state.trouble)
    text, _ = tick()
    assert "no p4d.24xlarge is left" in text


def test_a_tick_has_the_machines_looked_at(service: RunningService, redis_server: RedisServer):
    with redis_server.client(decode_responses=True) as broker:
        until(lambda: read_state(broker, service.keys, "cloud"))
        before = read_state(broker, service.keys, "cloud")
        tick()
        until(lambda: read_state(broker, service.keys, "cloud") != before, seconds=4.0)


def test_without_a_conductor_or_redis_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, redis_server: RedisServer
):
    monkeypatch.chdir(tmp_path)
    Path("valohai.toml").write_text(TOML)
    monkeypatch.setenv("VALOHAI_REDIS_URL", redis_server.unix_url)
    assert "no conductor looks after its machines" in tick()[0]
    monkeypatch.setenv("VALOHAI_REDIS_URL", f"unix://{tmp_path / 'nobody'}")
    assert "Redis is away" in tick()[0]


def test_without_groups_of_clouds_there_is_nothing_to_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    assert "no worker group" in tick()[0]
