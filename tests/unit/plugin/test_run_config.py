"""Defaults from a job's snapshot are those that Dagster itself fills in."""

from __future__ import annotations

from typing import Any

import dagster as dg
import pytest
from dagster._core.system_config.objects import ResolvedRunConfig

from tests.support.dagster_face import TWO_STEPS, project_of
from valohai_dagster.plugin.assets import project_assets
from valohai_dagster.plugin.run_config import config_with_defaults

OWN: dict[str, Any] = {
    "ops": {"digits__Prepare_data": {"config": {"parameters": {"rows": 7}}}},
    "execution": {"config": {"multiprocess": {"max_concurrent": 3}}},
}
WRITTEN: list[dict[str, Any]] = [
    {},
    {"ops": {"digits__Prepare_data": {"config": {"parameters": {"rows": 9}}}}},
    {"ops": {"digits__Prepare_data": {"config": {"parameters": {}}}}},
    {"ops": {"digits__train": {"config": {"parameters": {"learning-rate": 1}}}}},
    {"ops": {"digits__train": {"config": {"inputs": {"data": ["a"]}, "tags": ["x"]}}}},
    {"ops": {"digits__train": {"config": {"environment_variables": {"A": None, "B": "1"}}}}},
    {"execution": {"config": {"in_process": {}}}},
]


def job_of(config: dict[str, Any] | None) -> dg.JobDefinition:
    job = dg.define_asset_job("job", selection="*", config=config)
    assets = project_assets(project_of(TWO_STEPS))
    return dg.Definitions(assets=assets, jobs=[job]).resolve_job_def("job")


@pytest.mark.parametrize("own", [None, OWN], ids=["plain", "with its own config"])
@pytest.mark.parametrize("written", WRITTEN)
def test_the_ops_get_what_the_engine_would_give_them(
    own: dict[str, Any] | None, written: dict[str, Any]
) -> None:
    job = job_of(own)
    ours = config_with_defaults(job.get_job_snapshot(), written)
    engine = ResolvedRunConfig.build(job, written)
    assert {name: op["config"] for name, op in ours["ops"].items()} == {
        name: op.config for name, op in engine.ops.items()
    }
    assert ours["execution"]["config"] == engine.execution.execution_engine_config
