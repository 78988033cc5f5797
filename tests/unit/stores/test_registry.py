"""From settings to drivers: which is opened for what, and what is said when its library is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from valohai_dagster.settings import Settings
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.registry import open_stores

SECTIONS: dict[str, dict[str, Any]] = {
    "s3": {"bucket": "models", "region": "eu-west-1"},
    "gcs": {"bucket": "models", "anonymous": True},
    "azure": {"account": "shared", "container": "models", "account_key": "c2VjcmV0"},
    "swift": {
        "container": "models",
        "auth_url": "https://keys.example.com/v3",
        "user": "me",
        "key": "secret",
        "project": "team",
    },
    "http": {"base_url": "https://files.example.com/models"},
    "local": {"path": "/somewhere"},
}
URIS = {
    "s3": "s3://models/a/b",
    "gcs": "gs://models/a/b",
    "azure": "azure://shared/models/a/b",
    "swift": "swift://team/models/a/b",
    "http": "https://files.example.com/models/a/b",
    "local": "file:///somewhere/a/b",
}


def settings(tmp_path: Path) -> Settings:
    sections: Any = {kind: {"kind": kind, **section} for kind, section in SECTIONS.items()}
    return Settings(state_dir=tmp_path, stores=sections)


def test_t13_every_kind_is_opened_without_asking_anybody(tmp_path: Path) -> None:
    stores = open_stores(settings(tmp_path))
    assert {stores[name].kind for name in stores} == set(SECTIONS)
    assert all(isinstance(stores[name], Store) for name in stores)


@pytest.mark.parametrize("kind", sorted(URIS))
def test_i02_every_kind_serves_its_own_uris(tmp_path: Path, kind: str) -> None:
    stores = open_stores(settings(tmp_path))
    for uri in (URIS[kind], f"store://{kind}/a/b"):
        served = stores.serving(uri)
        assert served is not None
        assert (served[0].name, served[1]) == (kind, "a/b")


def test_the_library_of_a_kind_is_imported_when_a_store_is_of_that_kind(tmp_path: Path) -> None:
    code = (
        "import sys; from valohai_dagster.settings import Settings;"
        "from valohai_dagster.stores.registry import open_stores;"
        f"open_stores(Settings(state_dir={str(tmp_path)!r}));"
        "print(sorted({'boto3','botocore','google.cloud','azure.storage','keystoneauth1'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kind", "library", "extra"),
    [
        ("s3", "botocore", "aws"),
        ("gcs", "google", "gcp"),
        ("azure", "azure", "azure"),
        ("swift", "keystoneauth1", "swift"),
    ],
)
def test_a_missing_library_is_told_with_the_extra_that_brings_it(
    tmp_path: Path, kind: str, library: str, extra: str
) -> None:
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == {library!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
for name in [name for name in sys.modules if name.partition('.')[0] == {library!r}]:
    del sys.modules[name]
from valohai_dagster.errors import ConfigurationError
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import open_stores
try:
    open_stores(Settings(state_dir={str(tmp_path)!r}, stores={{"x": {{"kind": {kind!r}, **{SECTIONS[kind]!r}}}}}))
except ConfigurationError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"pip install 'valohai-dagster[{extra}]'" in done.stdout
    assert "the store 'x'" in done.stdout


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    found = settings(tmp_path)
    stores = open_stores(found)
    shown = repr(found) + "".join(repr(stores[name]) for name in stores)
    assert "c2VjcmV0" not in shown
    assert "'secret'" not in shown


def test_a_kind_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of local, s3"):
        Settings(stores={"x": {"kind": "ftp"}})  # pyright: ignore
