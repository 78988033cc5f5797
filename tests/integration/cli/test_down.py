"""`valohai-dagster down` leaves no process behind, whatever kind of group has started it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.redis_server import RedisServer
from tests.support.small_cloud import until
from valohai_dagster.capacity.clouds.base import Launch
from valohai_dagster.capacity.clouds.host_agents import lock_held
from valohai_dagster.capacity.clouds.registry import open_driver
from valohai_dagster.cli.conductor import down
from valohai_dagster.embedded.redis import EmbeddedRedis
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import load_settings

TOML = '[groups.local]\nkind = "simulated"\nboot_delay_seconds = 0\nthrottle_rate = 1.0\n'


def test_machines_of_a_cloud_that_is_not_there_end_too(
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALOHAI_REDIS_URL", redis_server.unix_url)
    Path("valohai.toml").write_text(TOML)
    settings = load_settings()
    records = open_records(settings)
    driver = open_driver(
        "local",
        settings.groups["local"].model_copy(update={"throttle_rate": 0.0}),  # type: ignore[arg-type]
        deployment=records.deployment_id,
        state_dir=settings.state_dir,
        redis_url=redis_server.unix_url,
    )
    records.close()
    (machine,) = driver.launch(Launch(token="t"))
    (lock,) = (settings.state_dir / "simulated" / "local").glob("*.lock")
    assert lock_held(lock)
    down(agents=True)
    assert f"stopped machine {machine}" in capsys.readouterr().out
    until(lambda: not lock_held(lock))
    down(agents=True)
    assert "nothing runs" in capsys.readouterr().out


def test_an_embedded_redis_of_earlier_settings_ends_too(
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    embedded = EmbeddedRedis(load_settings())
    embedded.ensure()
    Path("valohai.toml").write_text(f'redis_url = "{redis_server.unix_url}"\n')
    down(agents=True)
    assert "stopped the embedded Redis" in capsys.readouterr().out
    assert not embedded.running()
