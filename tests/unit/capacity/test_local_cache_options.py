"""What agents of a local group are told about caches (I-34, I-35)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from valohai_agent import cli
from valohai_dagster.capacity.clouds.local import LocalGroup
from valohai_dagster.settings_groups import LocalGroupSettings


async def _nothing(*given: Any) -> None:
    pass


def arguments(tmp_path: Path, **settings: Any) -> list[str]:
    group = LocalGroup(
        "g",
        LocalGroupSettings(**settings),
        state_dir=tmp_path,
        redis_url="redis://x",
        deployment="d",
        on_gone=_nothing,
        drain=_nothing,
    )
    return group._command("w")[3:]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, cli.CacheOptions(max_gb=None, disk_percent=80, shared=None, shared_copy=False)),
        (
            {"cache_max_gb": 2.5, "cache_disk_percent": 60, "shared_cache": "/mnt/share"},
            cli.CacheOptions(
                max_gb=2.5, disk_percent=60, shared=Path("/mnt/share"), shared_copy=False
            ),
        ),
        (
            {"shared_cache": "/mnt/share", "shared_cache_copy": True},
            cli.CacheOptions(
                max_gb=None, disk_percent=80, shared=Path("/mnt/share"), shared_copy=True
            ),
        ),
    ],
)
def test_settings_of_a_group_reach_its_agents(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    expected: cli.CacheOptions,
) -> None:
    seen: list[cli.AgentOptions] = []
    monkeypatch.setattr(cli, "run_agent", lambda options: seen.append(options) or 0)
    monkeypatch.setattr("valohai_agent.json_logging.set_up_logging", lambda **options: None)
    monkeypatch.setenv("VALOHAI_AGENT_REDIS", "redis://x")
    result = CliRunner().invoke(cli.app, arguments(tmp_path, **settings))
    assert result.exit_code == 0, result.output
    assert seen[0].cache == expected
