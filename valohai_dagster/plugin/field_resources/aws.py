"""`S3Resource` of dagster-aws, with the credentials, role and address of a store."""

from __future__ import annotations

from typing import Any

from dagster_aws.s3 import S3Resource
from pydantic import Field

from valohai_dagster.plugin.store_access import section_of
from valohai_dagster.settings_stores import S3StoreSettings


class StoreS3Resource(S3Resource):
    """Fits wherever an `S3Resource` is asked for; its client is that of the store."""

    store: str = Field(description="Name of the store in the settings.")
    settings_file: str | None = Field(
        None, description="valohai.toml to use. Default: the usual search."
    )

    def get_client(self) -> Any:
        from valohai_dagster.stores.s3_access import S3Access

        section = section_of(self.store, self.settings_file, S3StoreSettings)
        return S3Access(self.store, section).client
