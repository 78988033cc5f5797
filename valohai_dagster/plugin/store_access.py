"""How resources find the stores of the settings, in whichever process they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from valohai_dagster.errors import ConfigurationError

if TYPE_CHECKING:
    from valohai_dagster.settings import Settings
    from valohai_dagster.stores.base import Store

S = TypeVar("S")


def settings_of(settings_file: str | None) -> Settings:
    from pathlib import Path

    from valohai_dagster.settings import load_settings

    return load_settings(Path(settings_file) if settings_file else None)


def store_of(name: str, settings_file: str | None) -> Store:
    """The store of that name, opened; raises `StoreUnknown` with the known ones."""
    from valohai_dagster.stores.registry import open_stores

    return open_stores(settings_of(settings_file)).get(name)


def section_of(name: str, settings_file: str | None, kind: type[S]) -> S:
    """The settings of a store of that kind; raises `ConfigurationError` when they have become others."""
    settings = settings_of(settings_file)
    section = settings.stores.get(name)
    if isinstance(section, kind):
        return section
    found = f'kind = "{section.kind}"' if section else "no such store"
    raise ConfigurationError(
        f"the resource for the store {name!r} was made for another kind than the settings have now "
        f"({settings.config_file or 'no valohai.toml'}: {found}); reload the code location"
    )
