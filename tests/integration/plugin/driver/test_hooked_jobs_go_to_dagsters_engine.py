"""A job with hooks is not driven: hooks are user code, and only Dagster's engine calls them (DAGSTER_NOTES 2)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.plugin.driver.yamls import CHAIN
from tests.support.conductor import ConductorSide
from tests.support.dagster_side import Ask, Code
from tests.support.redis_server import RedisServer

HOOKED = """
import os
from pathlib import Path

import dagster as dg

from valohai_dagster import load_valohai_project, valohai_job


@dg.success_hook
def told(context):
    Path(os.environ["TOLD"]).write_text(context.op.name)


prep = dg.AssetSelection.assets(dg.AssetKey(["digits", "prep"]))
defs = dg.Definitions.merge(
    load_valohai_project(Path(__file__).parent / "digits"),
    dg.Definitions(
        jobs=[valohai_job("hooked", prep, hooks={told}), valohai_job("plain", prep)],
    ),
)
"""


def test_a_hook_fires_on_dagsters_engine_and_a_plain_job_is_driven(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told.txt"
    monkeypatch.setenv("TOLD", str(told))
    code = Code.write(tmp_path / "code", CHAIN, defs=HOOKED)
    with ConductorSide(tmp_path / "side", code, {}, redis_server, server=True) as side:
        hooked = side.run(Ask(job="hooked"))
        assert hooked.is_success
        assert told.read_text() == "digits__prep"
        assert "HOOK_COMPLETED" in side.kinds(hooked.run_id)
        plain = side.run(Ask(job="plain"))
        assert plain.is_success
        with side.service.records.read() as connection:
            driven = connection.exec_driver_sql("SELECT run_id FROM vh_runs").scalars().all()
    assert list(driven) == [plain.run_id]
