"""Stores as resources of assets written in Python, against real servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_aws.s3 import S3Resource
from dagster_azure.blob import AzureBlobStorageResource
from dagster_gcp.gcs import GCSResource

from tests.support.servers.kinds import AzureServer, GcsServer
from tests.support.servers.s3_stores import s3_store
from tests.support.servers.stores import azure_store, gcs_store
from valohai_dagster import StoreResource, load_settings, store_resources
from valohai_dagster.errors import ConfigurationError, StoreUnknown
from valohai_dagster.plugin import store_resources as module


def configure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, secrets: dict[str, str], **values: Any
) -> dict[str, Any]:
    """Resources of one store `my-models`; secrets come from the environment."""
    lines = [f"{name} = {json.dumps(str(value))}" for name, value in values.items()]
    file = tmp_path / "valohai.toml"
    file.write_text("\n".join(["[stores.my-models]", *lines, ""]))
    for name, value in secrets.items():
        monkeypatch.setenv(f"VALOHAI_STORES__my-models__{name}", value)
    return store_resources(load_settings(file))


def materialize(asset: Any, resources: dict[str, Any]) -> Any:
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([asset], resources=resources, instance=instance)
    assert result.success
    return result.output_for_node(asset.key.path[-1])


@pytest.fixture
def s3(tmp_path: Path, moto_server: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    store = s3_store(moto_server)
    return configure(
        tmp_path,
        monkeypatch,
        secrets={"SECRET_ACCESS_KEY": "hunter2"},
        kind="s3",
        bucket=store.place,
        endpoint_url=moto_server,
        access_key_id="testing",
    )


def test_an_asset_writes_and_reads_a_store(s3: dict[str, Any]) -> None:
    @dg.asset
    def report(store_my_models: StoreResource) -> list[str]:
        stored = store_my_models.put("reports/1.txt", b"one")
        store_my_models.put("reports/deep/2.txt", b"two")
        assert store_my_models.stat("reports/1.txt") == stored
        with store_my_models.open("reports/1.txt", offset=1) as file:
            assert file.read() == b"ne"
        assert store_my_models.uri("a").startswith("s3://")
        found = [item.key for item in store_my_models.list("reports/*.txt")]
        return found + [item.key for item in store_my_models.list("reports/deep")]

    assert materialize(report, s3) == ["reports/1.txt", "reports/deep/2.txt"]


def test_an_asset_uses_the_resource_of_dagster_aws(s3: dict[str, Any]) -> None:
    @dg.asset
    def written(s3_my_models: S3Resource, store_my_models: StoreResource) -> bytes:
        bucket = store_my_models.uri("").split("/")[2]
        s3_my_models.get_client().put_object(Bucket=bucket, Key="direct", Body=b"content")
        with store_my_models.open("direct") as file:
            return file.read()

    assert materialize(written, s3) == b"content"


def test_an_asset_uses_the_resource_of_dagster_gcp(
    tmp_path: Path, gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = gcs_store(gcs_server)
    store.put("a", b"content")
    resources = configure(
        tmp_path,
        monkeypatch,
        secrets={},
        kind="gcs",
        bucket=store.place,
        endpoint_url=gcs_server.endpoint,
        credentials_file=gcs_server.credentials_file,
    )

    @dg.asset
    def read(gcs_my_models: GCSResource) -> bytes:
        client = gcs_my_models.get_client()
        return client.bucket(store.place).blob("a").download_as_bytes()

    assert materialize(read, resources) == b"content"


def test_an_asset_uses_the_resource_of_dagster_azure(
    tmp_path: Path, azure_server: AzureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = azure_store(azure_server)
    store.put("a", b"content")
    container = store.place.rpartition("/")[2]
    resources = configure(
        tmp_path,
        monkeypatch,
        secrets={"ACCOUNT_KEY": azure_server.key},
        kind="azure",
        container=container,
        account=azure_server.account,
        endpoint_url=azure_server.endpoint,
    )

    @dg.asset
    def read(azure_my_models: AzureBlobStorageResource) -> bytes:
        with azure_my_models.get_client() as client:
            return client.get_blob_client(container, "a").download_blob().readall()

    assert materialize(read, resources) == b"content"


def test_no_secret_is_part_of_a_resource(s3: dict[str, Any]) -> None:
    """The UI shows what resources are configured with."""

    @dg.asset
    def anything(store_my_models: StoreResource) -> None: ...

    repository = dg.Definitions(assets=[anything], resources=s3).get_repository_def()
    shown = repr(s3) + repr(repository.get_top_level_resources())
    for resource in repository.get_top_level_resources().values():
        shown += repr(resource.config_schema.config_type) + str(
            resource.config_schema.default_value
        )
    assert "hunter2" not in shown
    assert "my-models" in shown


def test_every_store_has_a_resource_and_odd_names_fit(s3: dict[str, Any]) -> None:
    assert sorted(s3) == ["s3_my_models", "store_local", "store_my_models"]


def test_without_the_package_only_ours_is_there(
    s3: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    found = store_resources(load_settings(tmp_path / "valohai.toml"))
    assert sorted(found) == ["store_local", "store_my_models"]


def test_settings_that_have_changed_are_told(s3: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "valohai.toml").write_text('[stores.other]\npath = "x"\n')
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SECRET_ACCESS_KEY",):
            patch.delenv(f"VALOHAI_STORES__my-models__{name}")
        with pytest.raises(StoreUnknown, match="my-models"):
            s3["store_my_models"].stat("a")
        with pytest.raises(ConfigurationError, match=r"no such store.*reload the code location"):
            s3["s3_my_models"].get_client()
