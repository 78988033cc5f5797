"""`AzureBlobStorageResource` of dagster-azure, with the credentials and address of a store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dagster_azure.blob import AzureBlobStorageDefaultCredential, AzureBlobStorageResource
from pydantic import Field

from valohai_dagster.plugin.store_access import section_of
from valohai_dagster.settings_stores import AzureStoreSettings


class StoreAzureBlobStorageResource(AzureBlobStorageResource):
    """Fits wherever an `AzureBlobStorageResource` is asked for; its client is that of the store."""

    store: str = Field(description="Name of the store in the settings.")
    settings_file: str | None = Field(
        None, description="valohai.toml to use. Default: the usual search."
    )

    @classmethod
    def of(
        cls, store: str, section: AzureStoreSettings, settings_file: str | None
    ) -> StoreAzureBlobStorageResource:
        """Address and credential are what dagster-azure wants stated; the client has those of the store."""
        account = (
            section.account or "unknown"
        )  # its name is part of the connection string, a secret
        address = section.endpoint_url or f"https://{account}.blob.core.windows.net"
        return cls(
            store=store,
            settings_file=settings_file,
            account_url=address,
            credential=AzureBlobStorageDefaultCredential(),
        )

    @contextmanager
    def get_client(self) -> Iterator[Any]:
        from valohai_dagster.stores.azure import AzureStore

        section = section_of(self.store, self.settings_file, AzureStoreSettings)
        client = AzureStore(self.store, section).library
        try:
            yield client
        finally:
            client.close()
