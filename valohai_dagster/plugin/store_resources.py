"""Stores as Dagster resources, for assets and sensors written in Python: configured once, in the settings.

defs = dg.Definitions(assets=[...], resources=store_resources())

@dg.asset
def report(store_models: StoreResource, s3_models: S3Resource): ...
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, BinaryIO

import dagster as dg
from pydantic import Field

from valohai_dagster.plugin.store_access import settings_of, store_of

if TYPE_CHECKING:
    from valohai_dagster.settings import Settings
    from valohai_dagster.stores.base import ObjectStat, Store


class StoreResource(dg.ConfigurableResource[object]):
    """Any store of the settings, by its name: what can be done with all of them alike.

    Holds no credentials: the settings are read where the resource is used. Errors are `StoreError`s.
    """

    store: str = Field(description="Name of the store in the settings.")
    settings_file: str | None = Field(
        None, description="valohai.toml to use. Default: the usual search."
    )

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        """The content from `offset` on, to be closed; raises `StoreMissing`."""
        return self.driver.open(key, offset=offset)

    def put(self, key: str, content: BinaryIO | bytes) -> ObjectStat:
        """Writes a new object, in constant memory; raises `StoreConflict` when there is one: nothing is overwritten."""
        return self.driver.put(key, content)

    def list(self, pattern: str = "") -> list[ObjectStat]:
        """Objects whose key begins so; with `*` or `**`, those that match it (I-03)."""
        from valohai_dagster.stores.keys import Wildcard

        if "*" not in pattern:
            return [*self.driver.list(pattern)]
        wanted = Wildcard(pattern=pattern)
        return [item for item in self.driver.list(wanted.root) if wanted.matches(item.key)]

    def stat(self, key: str) -> ObjectStat | None:
        """Size, version and time of an object; None when there is none."""
        return self.driver.stat(key)

    def uri(self, key: str) -> str:
        """How inputs of steps name the object, such as s3://bucket/key."""
        return self.driver.uri(key)

    @property
    def driver(self) -> Store:
        """The store itself, for what is not here: signed requests, deleting."""
        return store_of(self.store, self.settings_file)


def store_resources(settings: Settings | None = None) -> dict[str, Any]:
    """Resources for every store of the settings (default: the usual search).

    `store_<name>` is a `StoreResource`. Beside it, where the package is installed, the field's own: `s3_<name>` of
    dagster-aws, `gcs_<name>` of dagster-gcp, `azure_<name>` of dagster-azure. Characters of a name that cannot stand
    in a Python name become `_`.
    """
    found = settings if settings is not None else settings_of(None)
    file = str(found.config_file) if found.config_file else None
    resources: dict[str, Any] = {}
    for name, section in found.stores.items():
        word = re.sub(r"\W", "_", name)
        resources[f"store_{word}"] = StoreResource(store=name, settings_file=file)
        package, make = _FIELD.get(section.kind, ("", None))
        if make is not None and find_spec(package) is not None:
            resources[f"{section.kind}_{word}"] = make(name, section, file)
    return resources


def _s3(name: str, section: Any, file: str | None) -> Any:
    from valohai_dagster.plugin.field_resources.aws import StoreS3Resource

    return StoreS3Resource(store=name, settings_file=file)


def _gcs(name: str, section: Any, file: str | None) -> Any:
    from valohai_dagster.plugin.field_resources.gcp import StoreGCSResource

    return StoreGCSResource(store=name, settings_file=file)


def _azure(name: str, section: Any, file: str | None) -> Any:
    from valohai_dagster.plugin.field_resources.azure import StoreAzureBlobStorageResource

    return StoreAzureBlobStorageResource.of(name, section, file)


_FIELD: dict[str, tuple[str, Callable[[str, Any, str | None], Any]]] = {
    "s3": ("dagster_aws", _s3),
    "gcs": ("dagster_gcp", _gcs),
    "azure": ("dagster_azure", _azure),
}
