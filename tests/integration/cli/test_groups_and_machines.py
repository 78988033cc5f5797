"""`valohai-dagster groups` and `machines` on a running service whose cloud is in the test."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service
from tests.support.small_cloud import SmallCloud, until
from valohai_dagster.capacity.clouds.base import Trouble
from valohai_dagster.cli import groups, machines
from valohai_dagster.cli.checks import check_groups
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.settings import load_settings

RUNNER = CliRunner()
TOML = """
default_group = "cloud"
[groups.cloud]
kind = "simulated"
max_machines = 2
price_per_hour = "3600"
env = {TOKEN = "hunter2"}
[groups.here]
kind = "static"
"""


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> SmallCloud:
    cloud = SmallCloud()
    monkeypatch.setattr(groups, "open_driver", lambda name, group, **_: cloud.open(name, group))
    return cloud


@pytest.fixture
def service(
    redis_server: RedisServer, cloud: SmallCloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[RunningService]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALOHAI_REDIS_URL", redis_server.unix_url)
    Path("valohai.toml").write_text(TOML)
    with running_service(load_settings(), drivers=cloud.open) as service:
        yield service


def said(app: typer.Typer, *arguments: str, code: int = 0) -> str:
    result = RUNNER.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def told(app: typer.Typer, *arguments: str, code: int = 0) -> Any:
    return json.loads(said(app, *arguments, "--json", code=code))


def group_row(name: str = "cloud") -> Any:
    return next(row for row in told(groups.app, "ls") if row["group"] == name)


def launch_one(service: RunningService, cloud: SmallCloud) -> str:
    service.client.submit(make_spec())
    until(lambda: cloud.machines)
    until(lambda: told(machines.app, "ls"))
    return next(iter(cloud.machines))


def test_a_machine_with_its_age_state_cost_and_reason(service: RunningService, cloud: SmallCloud):
    machine = launch_one(service, cloud)
    (row,) = told(machines.app, "ls", "--group", "cloud")
    assert (row["machine"], row["state"]) == (machine, "starting")
    assert row["cost"] == pytest.approx(row["age_seconds"], abs=0.1)
    assert machine in said(machines.app, "ls")
    assert machine in said(machines.app)
    shown = told(machines.app, "show", machine[:8])
    assert shown[0]["machine"] == machine
    text = said(machines.app, "show", machine)
    assert "state: starting" in text
    assert re.search(r"^created at: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC$", text, re.MULTILINE)
    assert "False" not in text
    assert "1 waiting" in said(machines.app, "history", "cloud")
    until(lambda: group_row()["machines"] == 1)
    assert "1/2" in said(groups.app, "ls")
    assert "1/2" in said(groups.app)


def test_a_machine_that_nobody_knows_is_told_so(service: RunningService):
    with pytest.raises(NotFoundError, match="machines ls --all"):
        said(machines.app, "show", "nobody")


def test_settings_changed_at_run_time_count_at_once_and_until_they_are_reset(
    service: RunningService, cloud: SmallCloud
):
    said(groups.app, "set", "cloud", "max_machines=0")
    service.client.submit(make_spec())
    until(lambda: group_row()["waiting"] == 1 and group_row()["max_machines"] == 0)
    assert "changed; the file has 2" in said(groups.app, "show", "cloud")
    assert not cloud.machines
    said(groups.app, "reset", "cloud", "max_machines")
    until(lambda: cloud.machines)
    assert told(groups.app, "show", "cloud")["changed"] == {}


def test_what_does_not_fit_together_is_refused_and_nothing_changes(service: RunningService):
    with pytest.raises(RefusedError, match="min_machines = 3 is more than max_machines = 2"):
        said(groups.app, "set", "cloud", "min_machines=3")
    with pytest.raises(RefusedError, match=r"'image' cannot be changed .* \[groups.cloud\]"):
        said(groups.app, "set", "cloud", "image=other")
    with pytest.raises(RefusedError, match="group here has no setting 'max_machines'"):
        said(groups.app, "set", "here", "max_machines=3")
    with pytest.raises(RefusedError, match="did you mean 'max_machines'"):
        said(groups.app, "set", "cloud", "max_machine=3")
    with pytest.raises(RefusedError, match="owner: must be user:NAME"):
        said(groups.app, "set", "cloud", "owner=team")
    with pytest.raises(RefusedError, match="has: cloud, here"):
        said(groups.app, "disable", "nobody")
    assert told(groups.app, "show", "cloud")["changed"] == {}


def test_a_change_that_does_not_fit_the_file_any_more_is_told_and_the_others_count(
    service: RunningService,
):
    said(groups.app, "set", "cloud", "enabled=false", "max_machines=1")
    Path("valohai.toml").write_text(TOML.replace("max_machines = 2", "min_machines = 2"))
    row = group_row()
    assert (row["enabled"], row["max_machines"]) == (False, 5)
    assert "min_machines = 2 is more than max_machines = 1; take the change back" in row["trouble"]
    assert "groups reset cloud max_machines" in row["trouble"]
    shown = said(groups.app, "show", "cloud")
    assert "max_machines = 5  (as in the file; changed to 1, which does not fit it)" in shown
    assert told(groups.app, "set", "cloud", "spot=true")["changed"] == {
        "enabled": False,
        "spot": True,
    }
    said(groups.app, "reset", "cloud", "max_machines")
    assert group_row()["trouble"] is None


def test_e01_a_disabled_group_gets_no_machines_until_it_is_enabled(
    service: RunningService, cloud: SmallCloud
):
    said(groups.app, "disable", "cloud")
    assert not group_row()["enabled"]
    said(groups.app, "disable", "here")
    said(groups.app, "enable", "cloud")
    assert group_row()["enabled"]
    assert not group_row("here")["enabled"]


def test_check_tells_in_words_what_the_cloud_does_not_like(
    service: RunningService, cloud: SmallCloud
):
    assert said(groups.app, "check").split() == ["ok", "cloud"]
    cloud.problems = ["image ami-1 is not there in eu-west-1"]
    assert "ami-1" in said(groups.app, "check", "cloud", code=1)
    assert told(groups.app, "check", code=1) == {"cloud": cloud.problems}
    with pytest.raises(RefusedError, match="no machines of its own"):
        said(groups.app, "check", "here")


def test_before_anything_was_started_a_group_has_no_machines_and_nothing_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    Path("valohai.toml").write_text(TOML)
    row = group_row()
    assert (row["machines"], row["trouble"]) == (0, None)
    assert row["standing"] == "no service runs; the next execution starts it"
    assert "0/2" in said(groups.app, "ls")
    text = said(groups.app, "show", "cloud")
    assert text.startswith(row["standing"])
    assert "max_machines = 2" in text
    assert "min_machines" not in text  # as it is by default


def test_machines_of_a_group_that_was_taken_out_of_the_settings_are_told(
    service: RunningService, cloud: SmallCloud, caplog: pytest.LogCaptureFixture
):
    launch_one(service, cloud)
    assert not left_behind_findings()
    service.leave()
    Path("valohai.toml").write_text('default_group = "here"\n[groups.here]\nkind = "static"\n')
    row = group_row("cloud")
    assert (row["kind"], row["machines"], row["max_machines"]) == ("simulated", 1, 0)
    assert "nobody ends its machines (1): put it back" in row["trouble"]
    assert row["trouble"] in said(groups.app, "ls")
    assert left_behind_findings() == [f"cloud: {row['trouble']}"]
    service.settings = load_settings()
    service.start()
    until(lambda: f"group cloud: {row['trouble']}" in caplog.text)


def left_behind_findings() -> list[str]:
    return [
        one.text
        for one in check_groups(load_settings())
        if one.level == "warn" and "nobody ends" in one.text
    ]


def test_show_tells_what_is_held_back_and_no_secret(service: RunningService, cloud: SmallCloud):
    cloud.no("the account may have 0 machines of this type", Trouble.quota)
    service.client.submit(make_spec())
    until(lambda: told(groups.app, "show", "cloud")["holds"])
    text = said(groups.app, "show", "cloud")
    assert "held until" in text
    assert "may have 0 machines" in text
    assert "hunter2" not in text
    until(lambda: "may have 0 machines" in str(group_row()["trouble"]))
    assert "held back until now: " in said(groups.app, "check", "cloud")
