"""A store whose place is missing, whose credentials are wrong or whose server is away says so, and is not empty."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from pydantic import SecretStr

from tests.contract.stores.conftest import changed
from tests.support.ports import free_port
from valohai_dagster.errors import StoreError, StoreMissing, StoreUnavailable
from valohai_dagster.stores.base import Store

HOUR = timedelta(hours=1)
PLACE = {"s3": "bucket", "gcs": "bucket", "azure": "container", "swift": "container"}
ADDRESS = {"swift": "auth_url"}
HIDDEN = "hunter2hunter2"
WRONG: dict[str, dict[str, Any]] = {
    "s3": {"secret_access_key": SecretStr(HIDDEN)},
    "azure": {"account_key": SecretStr(base64.b64encode(HIDDEN.encode()).decode())},
    "swift": {"key": SecretStr(HIDDEN)},
}
SHOWN = (HIDDEN, base64.b64encode(HIDDEN.encode()).decode(), "X-Amz-Sig", "sig=", "temp_url_sig")


def operations(store: Store) -> list[Callable[[], object]]:
    return [
        lambda: store.stat("a"),
        lambda: list(store.list()),
        lambda: store.open("a").read(),
        lambda: store.put("a", b"x"),
    ]


def test_a_missing_place_is_not_an_empty_one(remote: Store) -> None:
    store = changed(remote, **{PLACE[remote.kind]: "nobody-made-this"})
    for operation in operations(store):
        with pytest.raises(StoreUnavailable, match="nobody-made-this") as caught:
            operation()
        assert not isinstance(caught.value, StoreMissing)
        assert caught.value.store == "main"


def test_wrong_credentials_are_told_and_never_shown(
    remote: Store, needs: Callable[[str], None]
) -> None:
    needs("signatures")
    store = changed(remote, **WRONG[remote.kind])
    assert HIDDEN not in repr(store)
    for operation in operations(store):
        with pytest.raises(StoreError, match=r"\[stores\.main\]") as caught:
            operation()
        assert not isinstance(caught.value, StoreMissing)
        assert not [text for text in SHOWN if text in str(caught.value)]


def test_a_server_that_is_away_is_told(remote: Store) -> None:
    gone = f"http://127.0.0.1:{free_port()}/v1"
    options: dict[str, Any] = {
        ADDRESS.get(remote.kind, "endpoint_url"): gone,
        "connect_timeout_seconds": 1.0,
    }
    store = changed(remote, **options)
    with pytest.raises(StoreUnavailable, match=r"\[stores\.main\]"):
        store.stat("a")
