"""`ValohaiRunLauncher` as dagster.yaml names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from tests.support.redis_server import RedisServer
from valohai_dagster.plugin.launcher import ValohaiRunLauncher

OVERRIDES: dict[str, Any] = {
    "run_launcher": {"module": "valohai_dagster.plugin.launcher", "class": "ValohaiRunLauncher"}
}


def test_dagster_yaml_may_name_it() -> None:
    with dg.instance_for_test(overrides=OVERRIDES) as instance:
        launcher = instance.run_launcher
        assert isinstance(launcher, ValohaiRunLauncher)
        assert launcher.has_instance
        assert launcher._inner.has_instance
        assert launcher.supports_resume_run is True
        assert launcher.supports_check_run_worker_health is True


def test_a_changed_settings_file_counts_for_the_next_run(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The webserver and the daemon live on while people change the file."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "valohai.toml"
    file.write_text(f'redis_url = "{redis_server.unix_url}"\n')
    with dg.instance_for_test(overrides=OVERRIDES) as instance:
        launcher = instance.run_launcher
        assert isinstance(launcher, ValohaiRunLauncher)
        first = launcher._conductor
        assert launcher._conductor is first
        file.write_text("redis_url = ")  # half written
        assert launcher._conductor is first
        file.write_text(f'redis_url = "{redis_server.url}"\n# that of the network\n')
        second = launcher._conductor
        assert second is not first
        assert second._settings.redis_url == redis_server.url
        file.write_text(f'redis_url = "{redis_server.url}"\n# nothing else\n')
        assert launcher._conductor is second


def test_terminating_an_unknown_or_finished_run_is_false() -> None:
    @dg.op
    def nothing() -> None: ...

    @dg.job
    def job() -> None:
        nothing()

    with dg.instance_for_test(overrides=OVERRIDES) as instance:
        result = job.execute_in_process(instance=instance)
        assert instance.run_launcher.terminate(result.run_id) is False
        assert instance.run_launcher.terminate("00000000-0000-0000-0000-000000000000") is False
