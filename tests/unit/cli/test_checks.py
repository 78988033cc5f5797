"""The doctor's rules that need no servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from valohai_dagster.cli import checks
from valohai_dagster.cli.checks import Finding
from valohai_dagster.errors import BrokerUnavailable
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import (
    DockerGroupSettings,
    LocalGroupSettings,
    SimulatedGroupSettings,
    StaticGroupSettings,
)


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    values: dict[str, Any] = {"state_dir": tmp_path / "state"}
    return Settings(**values)


def test_one_broken_part_does_not_hide_the_others(here: Settings) -> None:
    def broken(settings: Settings) -> Iterator[Finding]:
        raise BrokerUnavailable("Redis is away")

    def fine(settings: Settings) -> list[Finding]:
        return [Finding(part="fine", level="ok", text="it is")]

    findings = list(checks.run_all(here, [("redis", broken), ("fine", fine)]))
    assert [(f.part, f.level, f.text) for f in findings] == [
        ("redis", "fail", "Redis is away"),
        ("fine", "ok", "it is"),
    ]


def test_a_state_directory_that_cannot_be_made_is_named_with_the_setting(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    values: dict[str, Any] = {"state_dir": tmp_path / "file" / "state"}
    (finding,) = checks.check_state_dir(Settings(**values))
    assert finding.level == "fail"
    assert finding.hint is not None
    assert "VALOHAI_STATE" in finding.hint


def test_time_outs_that_would_end_healthy_runs_are_each_named() -> None:
    instance = SimpleNamespace(
        run_monitoring_enabled=True,
        run_monitoring_start_timeout_seconds=180,
        run_monitoring_cancel_timeout_seconds=0,
        run_monitoring_max_runtime_seconds=3600,
    )
    found = [finding.text for finding in checks.monitoring_findings(instance)]
    assert [text.split(":")[0] for text in found] == [
        "run_monitoring.start_timeout_seconds is 180",
        "run_monitoring.max_runtime_seconds is 3600",
    ]


def test_without_run_monitoring_its_time_outs_do_not_matter() -> None:
    assert list(checks.monitoring_findings(SimpleNamespace(run_monitoring_enabled=False))) == []


def test_without_dagster_home_the_doctor_says_what_that_means(here: Settings) -> None:
    (finding,) = checks.check_dagster_home(here)
    assert finding.level == "note"
    assert "DAGSTER_HOME" in finding.text


def test_a_static_group_without_agents_tells_how_to_start_one() -> None:
    finding = checks._group_finding("gpu", StaticGroupSettings(kind="static"), 0)
    assert finding.level == "warn"
    assert finding.hint is not None
    assert "valohai-agent run --queue gpu" in finding.hint


def test_a_group_of_machines_is_well_without_any_and_tells_what_would_keep_them_away(
    tmp_path: Path,
) -> None:
    values: dict[str, Any] = {
        "state_dir": tmp_path,
        "groups": {
            "alpha": SimulatedGroupSettings(kind="simulated", max_machines=3),
            "boxes": DockerGroupSettings(kind="docker", image="python:3.12"),
        },
        "default_group": "alpha",
    }
    settings = Settings(**values)
    with closing(open_records(settings)) as records:
        (alpha,), boxes = (
            list(checks._machine_findings(records, settings, name, group, 0))
            for name, group in values["groups"].items()
        )
    assert (alpha.level, alpha.hint) == ("ok", None)
    assert alpha.text == "alpha: simulated, 0 of 3 machines, 0 agents checked in"
    assert {finding.level for finding in boxes} == {"warn"}
    told = " ".join(finding.text for finding in boxes)
    assert "agents publish" in told
    assert "embedded Redis" in told
    assert "join_url" in told
    assert "do not see the directory of the local store 'local'" in told
    assert "mount the directory" not in told  # containers have no mounts


def test_docker_is_not_asked_for_when_no_group_uses_it(here: Settings) -> None:
    values: dict[str, Any] = {
        "state_dir": here.state_dir,
        "groups": {"local": LocalGroupSettings(runtime="process")},
    }
    (finding,) = checks.check_docker(Settings(**values))
    assert finding.level == "ok"
