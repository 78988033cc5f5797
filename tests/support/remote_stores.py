"""Fresh places on the object stores of the tests, as sections of a settings file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from pydantic import SecretStr

from tests.support.servers.s3_stores import s3_store, swift_s3_store
from tests.support.servers.stores import azure_store, gcs_store, swift_store
from valohai_dagster.stores.base import Store

# Kind of server -> fixture that has it, and how a store on it is made.
KINDS: Mapping[str, tuple[str, Callable[..., Store]]] = {
    "s3": ("moto_server", s3_store),
    "s3-swift": ("swift_server", swift_s3_store),
    "gcs": ("gcs_server", gcs_store),
    "gcs-session": ("gcs_session_server", gcs_store),
    "azure": ("azure_server", azure_store),
    "swift": ("swift_server", swift_store),
}


def make_remote(kind: str, request: pytest.FixtureRequest, **options: Any) -> Store:
    """A driver on a new bucket or container of that kind of server."""
    fixture, make = KINDS[kind]
    return make(request.getfixturevalue(fixture), **options)


def section_of(store: Any, **changes: Any) -> dict[str, Any]:
    """The store's settings as `[stores.NAME]` has them, secrets shown."""
    section = store._section
    values = {name: getattr(section, name) for name in section.model_fields_set}
    shown = {k: v.get_secret_value() if isinstance(v, SecretStr) else v for k, v in values.items()}
    return {"kind": section.kind, **shown, **changes}


def toml_of(name: str, section: Mapping[str, Any]) -> str:
    """The section in TOML."""
    lines = [
        f"{key} = {json.dumps(value if isinstance(value, (bool, int, float)) else str(value))}"
        for key, value in section.items()
        if value is not None
    ]
    return "\n".join([f"[stores.{name}]", *lines, ""])
