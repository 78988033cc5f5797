"""`data datasets packaging ... on` in the embedded default: the command itself sees to a conductor (O-23)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.cli.test_data_versions import RUNNER, loads, put, run
from tests.support.ports import wait_for
from valohai_dagster.cli.app import app
from valohai_dagster.embedded.conductor import running_conductor
from valohai_dagster.settings import load_settings


def test_o23_packaging_starts_the_conductor_that_packs(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(short_tmp)
    monkeypatch.setenv("VALOHAI_STATE", str(short_tmp / "state"))
    run("datasets", "create", "faces/v1", put("a.txt"))
    assert running_conductor(load_settings()) is None
    try:
        done = run("datasets", "packaging", "faces/v1", "on")
        info = running_conductor(load_settings())
        assert info is not None
        assert f"the conductor (pid {info.pid}) packs it in the background" in done.stderr

        def packed() -> bool:
            return bool(loads("datasets", "show", "faces/v1")["packages"]["state"] == "made")

        wait_for(packed, seconds=60.0, what="the packages")
    finally:
        RUNNER.invoke(app, ["down"], catch_exceptions=False)
