"""The examples of docs/dagster-features.md do what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster import AssetKey

PAGE = Path(__file__).parents[3] / "docs" / "dagster-features.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def vision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALOHAI_STATE", str(tmp_path / "state"))
    project = tmp_path / "vision"
    project.mkdir()
    (project / "valohai.yaml").write_text(blocks("yaml")[0])
    return project


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_each_example_defines_both_steps(vision: Path, number: int) -> None:
    names: dict[str, Any] = {}
    exec(blocks("python")[number], names)
    defs: dg.Definitions = names["defs"]
    keys = {AssetKey(["vision", "prepare"]), AssetKey(["vision", "train"])}
    assert set(defs.resolve_all_asset_keys()) == keys
    dg.Definitions.validate_loadable(defs)


def test_the_component_of_the_page_loads(vision: Path) -> None:
    from dagster.components.testing import create_defs_folder_sandbox

    from valohai_dagster import ValohaiProjectComponent

    contents = yaml.safe_load(blocks("yaml")[1])
    contents["attributes"]["source"] = str(vision)
    with create_defs_folder_sandbox() as sandbox:
        path = sandbox.scaffold_component(
            component_cls=ValohaiProjectComponent, defs_yaml_contents=contents
        )
        with sandbox.load_component_and_build_defs(defs_path=path) as (_, defs):
            train: Any = defs.resolve_assets_def(AssetKey(["vision", "train"])).op
            prepare = defs.resolve_assets_def(AssetKey(["vision", "prepare"]))
    assert (train.retry_policy.max_retries, train.retry_policy.delay, train.pool) == (3, 60, "gpu")
    assert prepare.partitions_def is not None
    assert prepare.backfill_policy == dg.BackfillPolicy.single_run()
