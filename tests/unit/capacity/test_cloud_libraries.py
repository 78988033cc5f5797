"""Groups of clouds whose client library is not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from valohai_dagster.capacity.clouds.registry import open_driver
from valohai_dagster.errors import ConfigurationError
from valohai_dagster.settings_groups import GROUP_KINDS, CloudGroupSettings

_GROUPS: dict[str, tuple[str, dict[str, str]]] = {
    "gcp": ("google.cloud.compute_v1", {"project": "p"}),
    "azure": ("azure.mgmt.compute", {"subscription_id": "s", "resource_group": "r"}),
}


@pytest.mark.parametrize("kind", _GROUPS)
def test_the_extra_that_is_missing_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, values = _GROUPS[kind]
    monkeypatch.setitem(sys.modules, library, None)
    content: dict[str, Any] = {"kind": kind, "instance_type": "x", **values}
    settings = GROUP_KINDS[kind].model_validate(content)
    assert isinstance(settings, CloudGroupSettings)
    with pytest.raises(ConfigurationError, match=rf"valohai-dagster\[{kind}\]"):
        open_driver("g", settings, deployment="d", state_dir=tmp_path)
