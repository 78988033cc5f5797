"""`GCSResource` of dagster-gcp, with the credentials and address of a store."""

from __future__ import annotations

from typing import Any

from dagster_gcp.gcs import GCSResource
from pydantic import Field

from valohai_dagster.plugin.store_access import section_of
from valohai_dagster.settings_stores import GcsStoreSettings


class StoreGCSResource(GCSResource):
    """Fits wherever a `GCSResource` is asked for; its client is that of the store."""

    store: str = Field(description="Name of the store in the settings.")
    settings_file: str | None = Field(
        None, description="valohai.toml to use. Default: the usual search."
    )

    def get_client(self) -> Any:
        from valohai_dagster.stores.gcs import GcsStore

        section = section_of(self.store, self.settings_file, GcsStoreSettings)
        return GcsStore(self.store, section).library
