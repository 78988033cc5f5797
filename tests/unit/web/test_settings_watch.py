"""A conductor notices that its settings file has changed, whenever that was."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from valohai_dagster.embedded.conductor import info_path
from valohai_dagster.embedded.settings_in_use import file_stamp
from valohai_dagster.settings import Settings, load_settings
from valohai_dagster.web.settings_watch import InUse


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "valohai.toml"
    path.write_text("http_port = 5000\n")
    monkeypatch.setenv("VALOHAI_CONFIG", str(path))
    return path


def watch(settings: Settings) -> InUse:
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    return InUse(settings, on_demand=True)


def run(in_use: InUse, busy: Callable[[], bool] = lambda: False) -> None:
    """Until it has noticed; `busy` is asked at each look that finds other settings."""

    async def noticed() -> None:
        await asyncio.wait_for(in_use.until_changed(busy, every=0), 20)

    asyncio.run(noticed())


def announced(settings: Settings) -> str:
    return json.loads(info_path(settings).read_text())["stamp"]


def test_a_change_while_the_conductor_starts_is_noticed(config: Path) -> None:
    """Between the reading of the file and the first look, while it opens its database."""
    settings = load_settings()
    config.write_text("http_port = 50001\n")
    run(watch(settings))


def test_a_change_within_one_tick_of_the_clock_is_noticed(config: Path) -> None:
    settings, at = load_settings(), config.stat().st_mtime_ns
    config.write_text("http_port = 50001\n")
    os.utime(config, ns=(at, at))
    assert load_settings().http_port == 50001
    run(watch(settings))


def test_a_file_that_is_just_being_written_is_not_taken_for_other_settings(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many editors empty it first."""
    in_use, look, looks = watch(load_settings()), InUse._look, list[bool]()
    writes = {1: config.read_text(), 6: "http_port = 50001\n"}  # after so many looks
    config.write_text("")

    def and_write(self: InUse) -> bool:
        looks.append(look(self))
        if text := writes.get(len(looks)):
            config.write_text(text)
        return looks[-1]

    monkeypatch.setattr(InUse, "_look", and_write)
    run(in_use)
    assert len(looks) > 6


def test_a_conductor_that_cannot_tell_what_it_uses_goes_on(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Here its file is in the way; a full disk is the same."""
    settings = load_settings()
    in_use = watch(settings)
    in_use.announce()
    in_the_way = info_path(settings).with_suffix(".tmp")
    in_the_way.mkdir()
    config.write_text("http_port = 50001\n")
    looks: list[str] = []

    def busy() -> bool:
        looks.append(announced(settings))
        if len(looks) == 5:
            in_the_way.rmdir()
        return looks[-1] != file_stamp(config)

    run(in_use, busy)
    assert len(looks) == 6
    told = [record for record in caplog.records if "tried again" in record.getMessage()]
    assert len(told) == 1


def test_it_waits_for_what_runs(config: Path) -> None:
    in_use, asked = watch(load_settings()), list[bool]()
    config.write_text("http_port = 50001\n")

    def busy() -> bool:
        asked.append(len(asked) < 3)
        return asked[-1]

    run(in_use, busy)
    assert asked == [True, True, True, False]
