"""From input URIs to files: what each is, where it lies for the job, and how to reach it (CONTRACT 5.1, 5.2).

Runs when an execution is created (I-07). Stores are listed for wildcards; HTTP servers are never contacted here,
that is the worker's part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field

from valohai_agent.protocol import Checksums, JobFile, JobInput
from valohai_dagster.data import placement
from valohai_dagster.data.datums import Datum, get_datum, require_content
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.errors import RefusedError, ResolutionError, StoreError
from valohai_dagster.settings import GroupSettings
from valohai_dagster.stores.base import ObjectStat, Store
from valohai_dagster.stores.keys import Wildcard, check_key, has_wildcard
from valohai_dagster.stores.local import LocalStore
from valohai_dagster.stores.registry import Stores

MAX_FILES = 100_000  # of one execution; more belong into an archive (O-17)
_LATER = ("dataset", "model", "s3", "gs", "azure", "swift")


class Source(BaseModel):
    """How to mint a GET grant for one file: an object of a store, or a URL (which may hold credentials)."""

    model_config = ConfigDict(frozen=True)

    store: str | None = Field(default=None, description="Name of the store; with `key`.")
    key: str | None = None
    url: str | None = Field(
        default=None, repr=False, description="http(s):// or file:// URL as the worker uses it."
    )


@dataclass(frozen=True, kw_only=True)
class ResolvedInputs:
    inputs: list[JobInput]
    sources: dict[str, Source]  # by JobFile.id
    asked: dict[str, str]  # by JobFile.id: the URI that it was found by, as it may be shown
    warnings: list[str]


@dataclass(frozen=True, kw_only=True)
class _Found:
    """One file before it has its final place."""

    path: str
    uri: str
    source: Source
    size: int | None = None
    version: str | None = None  # as its store calls the content
    datum: Datum | None = None
    asked: str = ""


@dataclass(kw_only=True)
class _Resolver:
    connection: sa.Connection
    stores: Stores
    group: GroupSettings
    project_id: str | None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def files(self, spec: InputSpec) -> list[_Found]:
        """All files of one input in URI order; a URI that cannot be resolved becomes a problem."""
        found: list[_Found] = []
        for uri in spec.uris:
            try:
                asked = _shown(uri)
                found.extend(replace(one, asked=asked) for one in self._resolve(spec, uri))
            except (RefusedError, StoreError, ValueError) as error:
                self.problems.append(
                    f"input {spec.name!r}: {_shown(uri)}: {_without(str(error), uri)}"
                )
        if spec.filename and len(found) == 1:
            found = [_renamed(found[0], spec.filename)]
        elif spec.filename and found:
            self.warnings.append(
                f"input {spec.name!r}: filename {spec.filename!r} is ignored, the input has {len(found)} files"
            )
        return found

    def _resolve(self, spec: InputSpec, uri: str) -> Iterator[_Found]:
        scheme = urlsplit(uri).scheme.lower()
        if scheme in ("http", "https"):
            yield _http(uri, spec)
        elif scheme == "datum":
            yield self._datum(uri, spec)
        elif scheme in ("store", "file"):
            yield from self._objects(uri, spec)
        elif scheme in _LATER:
            raise RefusedError(f"{scheme}:// inputs are not supported by this release")
        else:
            raise RefusedError(
                "not an input URI; known are http(s)://, datum://, store://NAME/KEY and file:///PATH"
            )

    def _datum(self, uri: str, spec: InputSpec) -> _Found:
        datum = require_content(get_datum(self.connection, uri, project_id=self.project_id))
        return _Found(
            path=placement.place_datum(datum.name, keep=spec.keep_directories),
            uri=datum.uri,
            source=Source(store=datum.store, key=datum.key),
            size=datum.size,
            datum=datum,
        )

    def _objects(self, uri: str, spec: InputSpec) -> Iterator[_Found]:
        served = self.stores.serving(uri)
        if served is not None:
            store, pattern = served
            for stat, path in _select(store, pattern, spec):
                yield _Found(
                    path=path,
                    uri=store.uri(stat.key),
                    source=Source(store=store.name, key=stat.key),
                    size=stat.size,
                    version=stat.version,
                )
            return
        if uri.startswith("store://"):
            raise RefusedError(
                f"there is no such store; known are {', '.join(self.stores) or 'none'}"
            )
        root, pattern = self._file_root(uri)
        for stat, path in _select(root, pattern, spec):
            url = (root.root / stat.key).as_uri()
            if not self._may_read(f"/{stat.key}"):
                self.warnings.append(
                    f"input {spec.name!r}: {url} is left out, its link leads to a forbidden place"
                )
            else:
                yield _Found(
                    path=path,
                    uri=url,
                    source=Source(url=url),
                    size=stat.size,
                    version=stat.version,
                )

    def _file_root(self, uri: str) -> tuple[LocalStore, str]:
        """A plain directory as a read-only store at `/`, if the group may read that path."""
        if not uri.startswith("file:///"):
            raise RefusedError(
                "a file URI has three slashes and an absolute path: file:///data/*.csv"
            )
        path = unquote(uri.removeprefix("file://"))
        fixed = os.path.normpath(path.partition("*")[0].rpartition("/")[0] or "/")
        if ".." in path.split("/"):
            raise RefusedError("a file URI must not contain '..'")
        if not self._may_read(fixed):
            raise RefusedError(
                f"this worker group may not read {fixed} (nor what its links lead to); allow it with "
                f"file_inputs = [{fixed!r}] under [groups.NAME] in valohai.toml"
            )
        return LocalStore("file", Path("/"), readonly=True), path.lstrip("/")

    def _may_read(self, path: str) -> bool:
        if self.group.kind == "local" and self.group.mounts_allowed:
            return True
        real = os.path.realpath(path)
        return any(_below(real, os.path.realpath(root)) for root in self.group.file_inputs)


def resolve_inputs(
    inputs: Sequence[InputSpec],
    *,
    connection: sa.Connection,
    stores: Stores,
    group: GroupSettings,
    project_id: str | None,
) -> ResolvedInputs:
    """Every file of every input, placed. Raises `ResolutionError` with all problems at once (I-38)."""
    resolver = _Resolver(connection=connection, stores=stores, group=group, project_id=project_id)
    jobs: list[JobInput] = []
    sources: dict[str, Source] = {}
    asked: dict[str, str] = {}
    for number, spec in enumerate(inputs):
        found = _checked(resolver, spec)
        ids = {f"{number}.{position}": one for position, one in enumerate(found)}
        files, warnings, problems = placement.settle(
            spec.name, [_job_file(i, one) for i, one in ids.items()]
        )
        resolver.warnings.extend(warnings)
        resolver.problems.extend(problems)
        sources.update((file.id, ids[file.id].source) for file in files)
        asked.update((file.id, ids[file.id].asked) for file in files)
        jobs.append(
            JobInput(name=spec.name, input_id=spec.name, files=files, download=spec.download)
        )
    if len(sources) > MAX_FILES:
        resolver.problems.append(
            f"the inputs have {len(sources)} files, at most {MAX_FILES}; pack them into archives"
        )
    if resolver.problems:
        raise ResolutionError("inputs cannot be resolved", resolver.problems)
    return ResolvedInputs(inputs=jobs, sources=sources, asked=asked, warnings=resolver.warnings)


def _checked(resolver: _Resolver, spec: InputSpec) -> list[_Found]:
    known = len(resolver.problems)
    kept: list[_Found] = []
    for found in resolver.files(spec):
        try:
            check_key(found.path)
        except StoreError as error:
            resolver.problems.append(f"input {spec.name!r}: {found.uri} cannot be placed: {error}")
        else:
            kept.append(found)
    if not kept and not spec.optional and len(resolver.problems) == known:
        resolver.problems.append(_nothing(spec))
    return kept


def _nothing(spec: InputSpec) -> str:
    if not spec.uris:
        return f"input {spec.name!r} is required and has no URI; give it one at launch or a default in valohai.yaml"
    shown = ", ".join(_shown(uri) for uri in spec.uris)
    return f"input {spec.name!r} is required, but no file matches {shown}; check the path, or make the input optional"


def _select(store: Store, pattern: str, spec: InputSpec) -> Iterator[tuple[ObjectStat, str]]:
    """The objects that a key or wildcard means, in key order, and where each lies."""
    if not has_wildcard(pattern):
        found = store.stat(check_key(pattern, store=store.name))
        if found is None:
            raise RefusedError("there is no such file")
        yield found, placement.place(found.key, keep=spec.keep_directories)
        return
    wildcard = Wildcard(pattern=pattern, descend_last=spec.keep_directories != "none")
    for count, found in enumerate(store.list(_literal_prefix(wildcard))):
        if wildcard.matches(found.key):
            keep, root = spec.keep_directories, wildcard.root
            yield found, placement.place(found.key, keep=keep, root=root)
        if count > MAX_FILES * 10:
            raise RefusedError(
                f"more than {MAX_FILES * 10} objects lie below {wildcard.root!r}; name a deeper directory"
            )


def _literal_prefix(wildcard: Wildcard) -> str:
    return wildcard.pattern.partition("*")[0]


def _http(uri: str, spec: InputSpec) -> _Found:
    parts = urlsplit(uri)
    if not parts.hostname or parts.port == 0:
        raise RefusedError("the URL has no host")
    if any(ord(character) < ord(" ") for character in uri):
        raise RefusedError("the URL contains a line break or another control character")
    path = placement.place_url(uri, keep=spec.keep_directories)
    return _Found(path=path, uri=placement.public_url(uri), source=Source(url=uri))


def _job_file(file_id: str, found: _Found) -> JobFile:
    datum = found.datum
    return JobFile(
        id=file_id,
        name=found.path,
        uri=found.uri,
        size=found.size,
        checksums=datum.checksums if datum else Checksums(),
        datum_id=datum.id if datum else None,
        metadata=[datum.metadata] if datum and datum.metadata else [],
        cache_key=_cache_key(found),
    )


def _cache_key(found: _Found) -> str | None:
    if found.datum is not None:
        return f"sha256:{found.datum.sha256}" if found.datum.sha256 else None
    return f"{found.uri}@{found.version}" if found.version else None


def _renamed(found: _Found, filename: str) -> _Found:
    return replace(found, path=placement.rename(found.path, filename))


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _shown(uri: str) -> str:
    return placement.public_url(uri) if uri.lower().startswith(("http://", "https://")) else uri


def _without(text: str, uri: str) -> str:
    """The error without the URI that the message begins with already."""
    return text.removeprefix(f"{uri}: ")
