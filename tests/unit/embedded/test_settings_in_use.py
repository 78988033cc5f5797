"""What differs between the settings of a conductor and those of a command: names, never values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from valohai_dagster.embedded.settings_in_use import differing, digests, file_stamp
from valohai_dagster.settings import Settings


def settings(state: Path, **values: Any) -> Settings:
    return Settings(state_dir=state, **values)


def s3(secret: str = "hunter2", **values: Any) -> dict[str, Any]:
    return {
        "kind": "s3",
        "bucket": "b",
        "access_key_id": "k",
        "secret_access_key": secret,
        **values,
    }


def test_equal_settings_do_not_differ(tmp_path: Path) -> None:
    in_use = digests(settings(tmp_path, stores={"x": s3()}))
    assert differing(settings(tmp_path, stores={"x": s3()}, config_file=tmp_path), in_use) == []


def test_what_differs_is_named_and_no_value_is_told(tmp_path: Path) -> None:
    in_use = digests(settings(tmp_path, stores={"x": s3()}, secret_key="c2VjcmV0"))
    assert "hunter2" not in json.dumps(in_use)
    groups: Any = {"local": {"slots": 7}, "gpu": {"kind": "static"}}
    other = settings(tmp_path, stores={"x": s3("other"), "y": s3()}, groups=groups, http_port=1)
    assert differing(other, in_use) == [
        "groups.gpu",
        "groups.local.slots",
        "http_port",
        "secret_key",
        "stores.x.secret_access_key",
        "stores.y",
    ]


def test_a_table_that_is_gone_is_named_as_a_whole(tmp_path: Path) -> None:
    in_use = digests(settings(tmp_path, stores={"x": s3()}))
    assert differing(settings(tmp_path), in_use) == ["stores.x"]


def test_equal_values_have_other_digests_in_another_deployment(tmp_path: Path) -> None:
    first, second = (digests(settings(tmp_path)) for _ in range(2))
    assert not set(first.values()) & set(second.values())


def test_the_stamp_follows_the_file(tmp_path: Path) -> None:
    config = tmp_path / "valohai.toml"
    assert file_stamp(None) == file_stamp(config) == ""
    config.write_text("")
    assert file_stamp(config).startswith(str(config))
