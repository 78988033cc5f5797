"""The configured stores by name, and which of them serves a URI (I-02)."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

from valohai_dagster.errors import ConfigurationError, StoreUnknown
from valohai_dagster.settings import Settings
from valohai_dagster.settings_stores import LocalStoreSettings, StoreSettings
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.local import LocalStore

_DRIVERS = {  # kind: module, class, extra of this package that installs what the module imports
    "s3": ("s3", "S3Store", "aws"),
    "gcs": ("gcs", "GcsStore", "gcp"),
    "azure": ("azure", "AzureStore", "azure"),
    "swift": ("swift", "SwiftStore", "swift"),
    "http": ("http", "HttpStore", ""),
}


class Stores:
    """Stores of one deployment. `default`, `code` and `log` are the ones the settings choose."""

    def __init__(
        self, stores: Mapping[str, Store], *, default: str, code: str = "", log: str = ""
    ) -> None:
        self._stores = dict(stores)
        self._default, self._code, self._log = default, code or default, log or default

    def get(self, name: str) -> Store:
        """The store of that name; raises `StoreUnknown` with the known names."""
        if name in self._stores:
            return self._stores[name]
        raise _unknown(name, self._stores)

    def __getitem__(self, name: str) -> Store:
        return self.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._stores

    def __iter__(self) -> Iterator[str]:
        return iter(self._stores)

    def __len__(self) -> int:
        return len(self._stores)

    @property
    def default(self) -> Store:
        return self[self._default]

    @property
    def code(self) -> Store:
        return self[self._code]

    @property
    def log(self) -> Store:
        return self[self._log]

    def serving(self, uri: str) -> tuple[Store, str] | None:
        """The store that serves the URI and the key in it; the deepest one when several directories match."""
        found = [
            (store, key)
            for store in self._stores.values()
            if (key := store.key_of(uri)) is not None
        ]
        return min(found, key=lambda pair: len(pair[1])) if found else None


def open_stores(settings: Settings) -> Stores:
    """All configured stores; nothing is contacted yet."""
    stores = {name: make_store(name, section) for name, section in settings.stores.items()}
    return Stores(
        stores,
        default=settings.default_store,
        code=settings.code_store_name,
        log=settings.log_store_name,
    )


def open_store(settings: Settings, name: str) -> Store:
    """One of them, whatever the others need."""
    if name not in settings.stores:
        raise _unknown(name, settings.stores)
    return make_store(name, settings.stores[name])


def make_store(name: str, section: StoreSettings) -> Store:
    """The driver of one section; raises `ConfigurationError` when its libraries are not installed."""
    if isinstance(section, LocalStoreSettings):
        return LocalStore(name, section.path, readonly=section.readonly)
    module, driver, extra = _DRIVERS[section.kind]
    try:
        loaded = importlib.import_module(f"valohai_dagster.stores.{module}")
    except ImportError as error:
        if (error.name or "").startswith("valohai_dagster"):
            raise
        raise ConfigurationError(
            f'the store {name!r} has kind = "{section.kind}", which needs a library that is not installed '
            f"({error.name or error}); install it with `pip install 'valohai-dagster[{extra}]'`, "
            f"in a checkout with `sh deploy/make-venv.sh install .venv -e '.[{extra}]'`"
        ) from error
    store: Store = getattr(loaded, driver)(name, section)
    return store


def _unknown(name: str, known: Iterable[str]) -> StoreUnknown:
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return StoreUnknown(
        f"there is no store {name!r} in the settings; {meant}known are {', '.join(names) or 'none'}. "
        f"Add [stores.{name}] to valohai.toml. "
        "A service that runs already takes the file over once nothing runs, or at once after `valohai-dagster down`",
        store=name,
    )
