"""What docs/stores.md shows can be used as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from valohai_dagster.settings import load_settings
from valohai_dagster.settings_stores import STORE_KINDS, S3StoreSettings
from valohai_dagster.stores.registry import open_stores
from valohai_dagster.stores.s3_access import session_policy

PAGE = (Path(__file__).parents[3] / "docs" / "stores.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", [block for block in blocks("toml") if "[stores." in block])
def test_every_table_is_valid_and_opens(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "valohai.toml"
    file.write_text(text)
    for variable in re.findall(r"VALOHAI_STORES__\w+", text):
        monkeypatch.setenv(variable, "secret")
    if 'access_key_id = "' in text:
        assert "SECRET_ACCESS_KEY" in text
    assert len(open_stores(load_settings(file))) >= 2


def test_every_kind_has_a_section() -> None:
    for kind in STORE_KINDS:
        assert f"\n## {kind}\n" in PAGE


def actions(policy: str) -> set[str]:
    statements: list[Any] = json.loads(policy)["Statement"]
    return {action for statement in statements for action in statement["Action"]}


def test_e43_the_policy_of_the_page_is_what_a_session_is_limited_to() -> None:
    """A session may also look at old versions (E-43), which nothing here needs."""
    (shown,) = blocks("json")
    section = S3StoreSettings(kind="s3", bucket="b", endpoint_url="http://x")
    assert actions(shown) | {"s3:ListBucketVersions"} == actions(session_policy(section))
