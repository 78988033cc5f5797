"""A fresh bucket or container on one of the servers, and a driver that is open on it."""

from __future__ import annotations

import uuid
from typing import Any

import httpx

from tests.support.servers.kinds import AzureServer, GcsServer, SwiftServer
from valohai_dagster.settings_stores import (
    AzureStoreSettings,
    GcsStoreSettings,
    SwiftStoreSettings,
)
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.registry import make_store

PART_BYTES = 1024 * 1024  # small, so that small files have parts


def fresh_name() -> str:
    return f"t-{uuid.uuid4().hex[:16]}"


def gcs_store(server: GcsServer, **options: Any) -> Store:
    bucket = fresh_name()
    url = f"{server.endpoint}/storage/v1/b"
    made = httpx.post(url, json={"name": bucket}, params={"project": server.project})
    made.raise_for_status()
    values = {
        "bucket": bucket,
        "credentials_file": server.credentials_file,
        "endpoint_url": server.endpoint,
        "part_bytes": PART_BYTES,
        **options,
    }
    return make_store("main", GcsStoreSettings(kind="gcs", **values))


def azure_store(server: AzureServer, **options: Any) -> Store:
    from azure.storage.blob import BlobServiceClient

    container = fresh_name()
    with BlobServiceClient(server.endpoint, credential=server.key) as client:
        client.create_container(container).close()
    values = {
        "container": container,
        "account": server.account,
        "account_key": server.key,
        "endpoint_url": server.endpoint,
        "part_bytes": PART_BYTES,
        **options,
    }
    return make_store("main", AzureStoreSettings(kind="azure", **values))


def swift_store(server: SwiftServer, **options: Any) -> Store:
    container = fresh_name()
    headers = {"X-Auth-Token": swift_token(server)}
    httpx.put(f"{server.storage_url}/{container}", headers=headers).raise_for_status()
    values = {
        "container": container,
        "auth_version": "1",
        "auth_url": server.auth_url,
        "user": server.user,
        "key": server.key,
        "project": "test",
        "part_bytes": PART_BYTES,
        **options,
    }
    return make_store("main", SwiftStoreSettings(kind="swift", **values))


def swift_token(server: SwiftServer) -> str:
    login = {"X-Auth-User": server.user, "X-Auth-Key": server.key}
    return httpx.get(server.auth_url, headers=login).headers["X-Auth-Token"]
