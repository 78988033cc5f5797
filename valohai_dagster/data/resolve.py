"""From input URIs to files: what each is, where it lies for the job, and how to reach it (CONTRACT 5.1, 5.2).

Runs when an execution is created (I-07). What stores hold comes from a survey; HTTP servers that are no stores are
never contacted here, that is the worker's part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field

from valohai_agent.protocol import Checksums, JobFile, JobInput, JobPackage
from valohai_dagster.data import datasets, models, packaged, placement
from valohai_dagster.data.aliases import is_datum_id
from valohai_dagster.data.datums import SCHEME, Datum, find_datums, get_datum, require_content
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.survey import MAX_FILES, SETTINGS, Pattern, Survey, no_store, pattern_of
from valohai_dagster.errors import RefusedError, ResolutionError, StoreError
from valohai_dagster.settings_groups import GroupSettings
from valohai_dagster.stores.keys import check_key
from valohai_dagster.stores.local import LocalStore
from valohai_dagster.stores.registry import Stores


class Source(BaseModel):
    """How to mint a GET grant for one file: an object of a store, or a URL (which may hold credentials)."""

    model_config = ConfigDict(frozen=True)

    store: str | None = Field(default=None, description="Name of the store; with `key`.")
    key: str | None = None
    url: str | None = Field(
        default=None, repr=False, description="http(s):// or file:// URL as the worker uses it."
    )
    package: str | None = Field(
        default=None, description="Id of the package of a dataset version that it is."
    )


@dataclass(frozen=True, kw_only=True)
class ResolvedInputs:
    inputs: list[JobInput]
    sources: dict[str, Source]  # by JobFile.id
    asked: dict[str, str]  # by JobFile.id: the URI that it was found by, as it may be shown
    warnings: list[str]
    packages: list[JobPackage] = field(default_factory=list)


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
    package: packaged.Ref | None = None


@dataclass(kw_only=True)
class _Resolver:
    connection: sa.Connection
    stores: Stores
    survey: Survey
    group: GroupSettings
    project_id: str | None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    datums: dict[str, Datum] = field(default_factory=dict)  # of the input at hand, named by id

    def files(self, spec: InputSpec) -> list[_Found]:
        """All files of one input in URI order; a URI that cannot be resolved becomes a problem.

        Patterns that match nothing are named beside those; where the others have files they are worth a warning.
        """
        found: list[_Found] = []
        empty: list[str] = []
        known = len(self.problems)
        names = (uri.removeprefix(SCHEME) for uri in spec.uris if uri.startswith(SCHEME))
        self.datums = find_datums(self.connection, filter(is_datum_id, names))
        for uri in spec.uris:
            try:
                asked = placement.public_uri(uri)
                here = [replace(one, asked=asked) for one in self._resolve(spec, uri)]
                found.extend(here)
                if not here:
                    empty.append(asked)
            except (RefusedError, StoreError, ValueError) as error:
                self.problems.append(
                    f"input {spec.name!r}: {placement.public_uri(uri)}: {_without(str(error), uri)}"
                )
        told = [f"input {spec.name!r}: {asked}: no file matches" for asked in empty]
        if len(self.problems) > known:
            self.problems += told
        elif found:
            self.warnings += told
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
            yield self._http(uri, spec)
        elif scheme == "datum":
            datum = self.datums.get(uri.removeprefix(SCHEME).lower())
            yield _of_datum(
                datum or get_datum(self.connection, uri, project_id=self.project_id), spec
            )
        elif scheme == "dataset":
            version = datasets.get_version(self.connection, uri, project_id=self.project_id)
            yield from self._version(version, spec)
        elif scheme == "model":
            model = models.get_version(self.connection, uri, project_id=self.project_id)
            files = models.files_of(self.connection, model.id)
            yield from (_of_datum(datum, spec) for datum in files)
        elif scheme in ("store", "file", *SETTINGS):
            yield from self._objects(uri, spec)
        else:
            raise RefusedError(
                "not an input URI; known are datum://, dataset://, model://, http(s)://, s3://, gs://, azure://, "
                "swift://, store://NAME/KEY and file:///PATH"
            )

    def _version(self, version: datasets.DatasetVersion, spec: InputSpec) -> Iterator[_Found]:
        files = datasets.files_of(self.connection, version.id)
        found = packaged.look_up(self.connection, version)
        if found.warning is not None:
            self.warnings.append(f"input {spec.name!r}: {found.warning}")
        for datum in files:
            yield replace(_of_datum(datum, spec), package=found.by_datum.get(datum.id))

    def _objects(self, uri: str, spec: InputSpec) -> Iterator[_Found]:
        served = pattern_of(uri, self.stores, spec)
        if served is None and not uri.startswith("file:"):
            raise RefusedError(no_store(uri, self.stores))
        if served is None:
            yield from self._plain_files(uri, spec)
            return
        store, pattern = served
        for stat in self.survey.objects(pattern):
            yield _Found(
                path=_place(stat.key, pattern, spec),
                uri=store.uri(stat.key),
                source=Source(store=store.name, key=stat.key),
                size=stat.size,
                version=stat.version,
            )

    def _plain_files(self, uri: str, spec: InputSpec) -> Iterator[_Found]:
        """Files of directories that the group may read, where they are."""
        root, key = self._file_root(uri)
        pattern = Pattern(store="", key=key, descend=spec.keep_directories != "none")
        for stat in self.survey.objects(pattern, store=root):
            url = (root.root / stat.key).as_uri()
            if not self._may_read(f"/{stat.key}"):
                self.warnings.append(
                    f"input {spec.name!r}: {url} is left out, its link leads to a forbidden place"
                )
            else:
                yield _Found(
                    path=_place(stat.key, pattern, spec),
                    uri=url,
                    source=Source(url=url),
                    size=stat.size,
                    version=stat.version,
                )

    def _http(self, uri: str, spec: InputSpec) -> _Found:
        found = _url(uri, spec)
        served = pattern_of(uri, self.stores, spec)
        if served is None:
            return found
        store, pattern = served
        if pattern.wildcard is not None:
            raise RefusedError("HTTP servers cannot be searched; name one file")
        (stat,) = self.survey.objects(pattern)
        source = Source(store=store.name, key=stat.key)
        return replace(found, source=source, size=stat.size, version=stat.version)

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
    survey: Survey | None = None,
) -> ResolvedInputs:
    """Every file of every input, placed. Raises `ResolutionError` with all problems at once (I-38).

    `survey`: what stores have answered already; without it they are asked now.
    """
    resolver = _Resolver(
        connection=connection,
        stores=stores,
        survey=survey or Survey(stores),
        group=group,
        project_id=project_id,
    )
    jobs: list[JobInput] = []
    sources: dict[str, Source] = {}
    asked: dict[str, str] = {}
    packed: list[tuple[str, packaged.Ref]] = []
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
        if spec.download == "always":
            packed += [(f.id, ref) for f in files if (ref := ids[f.id].package) is not None]
        jobs.append(
            JobInput(name=spec.name, input_id=spec.name, files=files, download=spec.download)
        )
    if len(sources) > MAX_FILES:
        resolver.problems.append(
            f"the inputs have {len(sources)} files, at most {MAX_FILES}; pack them into archives"
        )
    if resolver.problems:
        raise ResolutionError("inputs cannot be resolved", resolver.problems)
    found = packaged.of_files(packed)
    sources.update(
        (ident, Source(store=ref.package.store, key=ref.package.key, package=ref.package.id))
        for ident, (ref, _) in found.items()
    )
    return ResolvedInputs(
        inputs=jobs,
        sources=sources,
        asked=asked,
        warnings=resolver.warnings,
        packages=[packaged.job_package(ident, ref, files) for ident, (ref, files) in found.items()],
    )


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
    shown = ", ".join(placement.public_uri(uri) for uri in spec.uris)
    return f"input {spec.name!r} is required, but no file matches {shown}; check the path, or make the input optional"


def _place(key: str, pattern: Pattern, spec: InputSpec) -> str:
    wildcard = pattern.wildcard
    root = wildcard.root if wildcard else ""
    return placement.place(key, keep=spec.keep_directories, root=root)


def _of_datum(datum: Datum, spec: InputSpec) -> _Found:
    require_content(datum)
    return _Found(
        path=placement.place_datum(datum.name, keep=spec.keep_directories),
        uri=datum.uri,
        source=Source(store=datum.store, key=datum.key),
        size=datum.size,
        datum=datum,
    )


def _url(uri: str, spec: InputSpec) -> _Found:
    parts = urlsplit(uri)
    try:
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # whose words may repeat a piece of a password
        raise RefusedError(
            "the URL's port is not a number; in a user's name or password, write `/`, `?`, `#` and `@` as %2F, %3F, "
            "%23 and %40"
        ) from None
    if not has_host:
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
        datum = found.datum  # without checksums its id stands for its content, which never changes
        return (
            f"sha256:{datum.sha256}"
            if datum.sha256
            else f"{datum.uri}@{datum.trusted_version or datum.size}"
        )
    return f"{found.uri}@{found.version}" if found.version else None


def _renamed(found: _Found, filename: str) -> _Found:
    return replace(found, path=placement.rename(found.path, filename))


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _without(text: str, uri: str) -> str:
    """The error without the URI that the message begins with already."""
    return text.removeprefix(f"{uri}: ")
