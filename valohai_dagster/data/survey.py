"""What stores hold at the URIs of inputs: asked once per pattern, before anything is written down.

The answers of stores behind a network are got outside of any transaction (`remote_patterns`, then `look` for each);
directories on this host are looked at when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Union
from urllib.parse import urlsplit

from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.errors import RefusedError, StoreError, ValohaiError
from valohai_dagster.stores.base import ObjectStat, Store
from valohai_dagster.stores.keys import Wildcard, check_key, has_wildcard
from valohai_dagster.stores.registry import Stores

MAX_FILES = 100_000  # of one execution; more belong into an archive (O-17)
MAX_LISTED = 10 * MAX_FILES  # objects that a listing may go through to find them

# What to put into valohai.toml so that a URI without a store gets one, by scheme.
SETTINGS = {
    "s3": 'kind = "s3", bucket = "{0}"',
    "gs": 'kind = "gcs", bucket = "{0}"',
    "azure": 'kind = "azure", account = "{0}", container = "{1}"',
    "swift": 'kind = "swift", project = "{0}", container = "{1}"',
}

Answer = Union[Sequence[ObjectStat], ValohaiError]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A key or wildcard in a store; `descend` lets a trailing `/*` descend (I-03)."""

    store: str
    key: str
    descend: bool = False

    @property
    def wildcard(self) -> Wildcard | None:
        """None for the key of one object."""
        if not has_wildcard(self.key):
            return None
        return Wildcard(pattern=self.key, descend_last=self.descend)


class Survey:
    """Answers of stores by pattern; what was not asked before is asked now, and remembered."""

    def __init__(self, stores: Stores, answers: Mapping[Pattern, Answer] | None = None) -> None:
        self._stores = stores
        self._answers = dict(answers or {})

    def objects(self, pattern: Pattern, *, store: Store | None = None) -> Sequence[ObjectStat]:
        """The matching objects in key order. `store`: one that is not in the settings.

        Raises what the store answered, and `RefusedError` for one object that is not there.
        """
        if pattern not in self._answers:
            try:
                self._answers[pattern] = look(store or self._stores.get(pattern.store), pattern)
            except ValohaiError as error:
                self._answers[pattern] = error
        answer = self._answers[pattern]
        if isinstance(answer, ValohaiError):
            raise answer
        return answer


def look(store: Store, pattern: Pattern) -> Sequence[ObjectStat]:
    """Asks the store; keeps matching objects only, and no more than an execution may have."""
    wildcard = pattern.wildcard
    if wildcard is None:
        found = store.stat(check_key(pattern.key, store=store.name))
        if found is None:
            raise RefusedError(f"there is no such file in the store {store.name!r}")
        return [found]
    matching: list[ObjectStat] = []
    for count, found in enumerate(store.list(_literal_prefix(wildcard))):
        if wildcard.matches(found.key):
            matching.append(found)
        if len(matching) > MAX_FILES:
            raise RefusedError(
                f"more than {MAX_FILES} files match; name a deeper directory, or pack them into archives"
            )
        if count > MAX_LISTED:
            raise RefusedError(
                f"more than {MAX_LISTED} objects lie below {wildcard.root!r}; name a deeper directory"
            )
    return matching


def pattern_of(uri: str, stores: Stores, spec: InputSpec) -> tuple[Store, Pattern] | None:
    """The store that serves the URI (I-02) and what to look for in it; None when no store does.

    A URL with credentials of its own is fetched with those.
    """
    if uri.lower().startswith(("http://", "https://")) and "@" in urlsplit(uri).netloc:
        return None
    served = stores.serving(uri)
    if served is None:
        return None
    store, key = served
    descend = spec.keep_directories != "none" and has_wildcard(key)
    return store, Pattern(store=store.name, key=key, descend=descend)


def remote_patterns(inputs: Iterable[InputSpec], stores: Stores) -> list[Pattern]:
    """What has to be asked of stores behind a network."""
    found: dict[Pattern, None] = {}
    for spec in inputs:
        for uri in spec.uris:
            try:
                served = pattern_of(uri, stores, spec)
            except (StoreError, RefusedError, ValueError):
                continue  # the resolution will name it
            if served is not None and served[0].kind != "local":
                found[served[1]] = None
    return list(found)


def no_store(uri: str, stores: Stores) -> str:
    """I-02: which setting would make a store serve it."""
    scheme, _, rest = uri.partition("://")
    if scheme.lower() == "store":
        return f"there is no such store; known are {', '.join(stores) or 'none'}"
    known = ", ".join(stores.get(name).uri("").rstrip("/") or name for name in stores)
    text = f"no store of the settings serves it; those that there are serve {known}"
    setting = SETTINGS.get(scheme.lower(), 'kind = "http" or "local"')
    first, second, *_ = [*rest.split("/"), "", ""]
    return (
        f"{text}. Add a section [stores.NAME] with {setting.format(first, second)} to valohai.toml"
    )


def _literal_prefix(wildcard: Wildcard) -> str:
    return wildcard.pattern.partition("*")[0]
