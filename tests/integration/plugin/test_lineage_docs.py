"""The examples of docs/lineage.md do what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import AssetKey

from valohai_dagster.settings import load_settings

PAGE = Path(__file__).parents[3] / "docs" / "lineage.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_each_example_defines_the_step_and_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "valohai.yaml").write_text(blocks("yaml")[0])
    names: dict[str, Any] = {}
    exec(blocks("python")[number], names)
    defs: dg.Definitions = names["defs"]
    images = AssetKey(["vision", "external", "s3", "vision_data", "raw_any_png"])
    labels = AssetKey(["vision", "external", "https", "data_example_com", "labels_json"])
    prepare = AssetKey(["vision", "prepare"])
    assert set(defs.resolve_all_asset_keys()) == {images, labels, prepare}
    assert defs.resolve_asset_graph().get(prepare).parent_keys == {images, labels}
    dg.Definitions.validate_loadable(defs)


def test_the_settings_of_the_page_are_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "valohai.toml"
    config.write_text(blocks("toml")[0])
    retention = load_settings(config).retention
    assert (retention.days("outputs", "scratch"), retention.days("outputs", "other")) == (7, 180)
    assert retention.keep_tags == ["golden"]
