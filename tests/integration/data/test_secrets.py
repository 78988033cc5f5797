"""Variables in groups: encrypted in the records, the key made once and never guessed."""

from __future__ import annotations

import base64
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.integration.data.conftest import NOW, Place
from valohai_dagster.data import secrets
from valohai_dagster.data.secrets import SecretKey, load_secret_key
from valohai_dagster.errors import ConfigurationError, RefusedError
from valohai_dagster.records import tables
from valohai_dagster.settings import Settings

BOTH = pytest.mark.parametrize("place", ["sqlite", "postgres"], indirect=True)
KEY = SecretKey(b"k" * 32)


def put(
    place: Place, group: str, name: str, value: str = "hunter2", *, secret: bool = True
) -> None:
    with place.records.write() as connection:
        secrets.set_variable(
            connection, KEY, group=group, name=name, value=value, now=NOW, secret=secret
        )


@BOTH
def test_k72_k73_groups_apply_in_their_listed_order(place: Place) -> None:
    put(place, "a", "X", "1")
    put(place, "b", "X", "2", secret=False)
    put(place, "b", "Y", "ä\n3")
    put(place, "c", "Z", "4")
    with place.records.read() as connection:
        found = secrets.variables_of_groups(connection, ["b", "none", "a"], KEY)
        assert [(v.group, v.name, v.value) for v in found] == [
            ("b", "X", "2"),
            ("b", "Y", "ä\n3"),
            ("a", "X", "1"),
        ]
        assert secrets.unknown_groups(connection, ["b", "none"]) == ["none"]


@BOTH
def test_k74_secret_values_are_not_readable_without_the_key(place: Place) -> None:
    put(place, "g", "TOKEN", "hunter2hunter2")
    put(place, "g", "PLAIN", "visible", secret=False)
    with place.records.read() as connection:
        stored = connection.execute(sa.select(tables.secrets)).all()
        listed = secrets.list_variables(connection, "g")
        without = secrets.variables_of_groups(connection, ["g"])
    assert b"hunter2" not in b"".join(row.value for row in stored)
    assert [(v.name, v.value) for v in listed] == [("PLAIN", "visible"), ("TOKEN", "")]
    assert listed == without
    assert "hunter2" not in repr(listed)
    assert b"hunter2" not in (place.records.engine.url.database or "").encode()


@BOTH
def test_equal_values_are_stored_differently(place: Place) -> None:
    assert KEY.encrypt(b"x") != KEY.encrypt(b"x")
    content = {"a": [1, "ä"]}
    assert KEY.decrypt_json(KEY.encrypt_json(content)) == content


@BOTH
def test_setting_again_replaces_and_removing_tells_whether_it_was_there(place: Place) -> None:
    put(place, "g", "X", "1")
    put(place, "g", "X", "2", secret=False)
    with place.records.write() as connection:
        (found,) = secrets.list_variables(connection)
        assert (found.value, found.secret) == ("2", False)
        assert secrets.remove_variable(connection, group="g", name="X")
        assert not secrets.remove_variable(connection, group="g", name="X")


def test_another_key_does_not_open_them(place: Place) -> None:
    put(place, "g", "X")
    other = SecretKey(b"o" * 32, origin="/state/secret.key")
    with (
        place.records.read() as connection,
        pytest.raises(ConfigurationError, match=r"/state/secret\.key: the key was changed"),
    ):
        secrets.variables_of_groups(connection, ["g"], other)
    with pytest.raises(ConfigurationError, match="cannot be decrypted"):
        KEY.decrypt(b"short")


@pytest.mark.parametrize(
    ("group", "name", "value", "expected"),
    [
        ("", "X", "v", "is no group name"),
        ("a\nb", "X", "v", "is no group name"),
        ("g", "1X", "v", "is no environment variable name"),
        ("g", "A=B", "v", "is no environment variable name"),
        ("g", "X" * 256, "v", "is no environment variable name"),
        ("g", "VH_JOB_ID", "v", "set by the platform"),
        ("g", "VH_INPUTS_DIR", "v", "set by the platform"),
        ("g", "X", "a\0b", "NUL"),
    ],
)
def test_impossible_variables_are_refused_without_showing_the_value(
    place: Place, group: str, name: str, value: str, expected: str
) -> None:
    with pytest.raises(RefusedError, match=expected):
        put(place, group, name, value)


def test_k73_agent_switches_may_be_set(place: Place) -> None:
    put(place, "g", "VH_NO_DATA_CACHE", "1")


def test_the_key_file_is_made_once_and_private(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "state")
    keys: list[SecretKey] = []
    threads = [
        threading.Thread(target=lambda: keys.append(load_secret_key(settings))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sealed = keys[0].encrypt(b"x")
    assert [key.decrypt(sealed) for key in keys] == [b"x"] * 8
    assert (tmp_path / "state" / "secret.key").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["secret.key"]


def test_the_key_of_the_settings_is_used_and_makes_no_file(tmp_path: Path) -> None:
    text = base64.b64encode(b"k" * 32).decode()
    settings = Settings.model_validate({"state_dir": tmp_path / "state", "secret_key": text})
    assert KEY.decrypt(load_secret_key(settings).encrypt(b"x")) == b"x"
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "content", ["not base64!", base64.b64encode(b"short").decode(), "", "\xff"]
)
def test_a_broken_key_is_named_and_not_shown(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(content.encode("latin-1"))
    settings = Settings(state_dir=tmp_path, secret_key_file=path)
    with pytest.raises(ConfigurationError, match=str(path)) as caught:
        load_secret_key(settings)
    assert not content.strip() or content not in str(caught.value)
