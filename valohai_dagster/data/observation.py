"""What a source outside holds now: one version text for what executions would read of it, and facts to show.

The version is made of the same parts whether somebody looks (`observe`) or an execution has used the source
(`version_used`), so that both can be compared: of one file what its store calls the content, of several a digest of
their names and versions, and the sha256 where a server names no version. Files of a dataset or a model count by their
own names and checksums, whichever datums they are: two versions that hold the same are one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Protocol

import sqlalchemy as sa

from valohai_agent.protocol import JobFile
from valohai_dagster.data.external import ExternalSource
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.resolve import Source, resolve_inputs
from valohai_dagster.errors import ResolutionError, SourceUnreadable, StoreError
from valohai_dagster.settings_groups import GroupSettings
from valohai_dagster.stores.registry import Stores

CHUNK_BYTES = 1024 * 1024
SECONDS = 30.0  # without an answer of a web server
LONGEST = 200  # characters of a version; longer ones become a digest
_WEB = ("http://", "https://")
_DATED = re.compile(r"\w{3}, .* GMT\|\d*")  # what a worker calls web content without a strong ETag


class UsedFile(Protocol):
    """What the records know of an input file of an execution."""

    @property
    def name(self) -> str: ...

    @property
    def uri(self) -> str: ...

    @property
    def version(self) -> str | None: ...

    @property
    def sha256(self) -> str | None: ...

    @property
    def datum_id(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class SeenFile:
    uri: str
    version: str
    size: int | None = None
    mtime: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A source at one moment."""

    version: str
    files: tuple[SeenFile, ...]

    @property
    def size(self) -> int | None:
        """Of all files; None when one of them is not known."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def mtime(self) -> datetime | None:
        return max((file.mtime for file in self.files if file.mtime), default=None)


def observe(
    source: ExternalSource,
    *,
    connection: sa.Connection,
    stores: Stores,
    group: GroupSettings,
    project_id: str | None,
) -> Seen:
    """Looks at the source as an execution of that group would find it.

    Raises `SourceUnreadable` with the reason: nothing there, denied, the store is down.
    """
    wanted = InputSpec(
        name="source",
        uris=[source.read],
        optional=source.is_pattern,
        keep_directories="full" if source.keeps_directories else "none",
    )
    try:
        resolved = resolve_inputs(
            [wanted], connection=connection, stores=stores, group=group, project_id=project_id
        )
        files = resolved.inputs[0].files
        found = [_seen(file, resolved.sources[file.id], stores, source) for file in files]
    except ResolutionError as error:
        raise _unreadable(source, "; ".join(error.problems)) from None
    except StoreError as error:
        raise _unreadable(source, str(error)) from None
    pairs = zip(_names(files), [file.version for file in found], strict=True)
    return Seen(version=version_of(pairs, is_pattern=source.is_pattern), files=tuple(found))


def version_used(files: Sequence[UsedFile], *, is_pattern: bool) -> str | None:
    """The same of the files that an execution took; None when it took none, or one of them was not read."""
    pairs = list(zip(_names(files), map(_version_used, files), strict=True))
    known = [(name, version) for name, version in pairs if version is not None]
    if not pairs or len(known) < len(pairs):
        return None
    return version_of(known, is_pattern=is_pattern)


def _version_used(file: UsedFile) -> str | None:
    if file.datum_id is not None:
        return file.sha256 or file.uri
    if file.version is not None and _DATED.fullmatch(file.version):
        return file.sha256 or file.version
    return file.version or file.sha256


def _names(files: Sequence[UsedFile] | Sequence[JobFile]) -> list[str]:
    """What tells the files of a source apart: their URIs.

    A datum's id says nothing about its content, so of datums it is the last part of the name: the directories before
    it are placed as each input wants. An only one needs none; an input's `filename` may have replaced it.
    """
    if len(files) == 1 and files[0].datum_id is not None:
        return [""]
    return [file.uri if file.datum_id is None else file.name.rpartition("/")[2] for file in files]


def version_of(files: Iterable[tuple[str, str]], *, is_pattern: bool) -> str:
    """One text for (name, version) of all files."""
    pairs = sorted((name, plain_version(version)) for name, version in files)
    if len(pairs) == 1 and not is_pattern:
        return pairs[0][1]
    return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()[:40]


def plain_version(version: str) -> str:
    """An ETag without its quotes, and nothing that is too long for a tag.

    >>> plain_version('"abc"')
    'abc'
    """
    text = version.strip('"')
    return text if len(text) <= LONGEST else hashlib.sha256(text.encode()).hexdigest()


def _seen(file: JobFile, where: Source, stores: Stores, source: ExternalSource) -> SeenFile:
    if where.url is not None and where.url.lower().startswith(_WEB):
        return ask_server(where.url, file.uri)
    if file.datum_id is not None:
        version = file.checksums.sha256 or file.uri
        return SeenFile(uri=file.uri, version=version, size=file.size)
    version = (file.cache_key or "").removeprefix(f"{file.uri}@")
    found = SeenFile(uri=file.uri, version=version, size=file.size)
    if source.is_pattern or where.store is None or where.key is None:
        return found
    stat = stores[where.store].stat(where.key)
    return replace(found, mtime=stat.mtime) if stat is not None else found


def ask_server(url: str, shown: str) -> SeenFile:
    """ETag, size and time of a file on a web server; where it names no strong ETag, the sha256 of the content.

    Raises `SourceUnreadable`; `shown` is the URL without credentials, for messages.
    """
    import httpx

    from valohai_dagster.stores.remote import certificates  # which keeps addresses out of the log

    headers = {"Accept-Encoding": "identity"}
    try:
        with (
            httpx.Client(verify=certificates(), follow_redirects=True, timeout=SECONDS) as client,
            client.stream("GET", url, headers=headers) as answer,
        ):
            if not answer.is_success:
                what = {401: "denied", 403: "denied", 404: "not there"}.get(answer.status_code)
                text = f"the server answers {answer.status_code}" + (f", {what}" if what else "")
                raise SourceUnreadable(f"{shown} cannot be observed: {text}; check the address")
            etag = answer.headers.get("ETag", "")
            length = answer.headers.get("Content-Length", "")
            found = SeenFile(
                uri=shown,
                version=etag,
                size=int(length) if length.isdigit() else None,
                mtime=_http_time(answer.headers.get("Last-Modified")),
            )
            if etag and not etag.startswith("W/"):
                return found
            digest, size = hashlib.sha256(), 0
            for chunk in answer.iter_bytes(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
            return replace(found, version=digest.hexdigest(), size=size)
    except httpx.HTTPError as error:
        kind = type(error).__name__  # its text may repeat the URL
        raise SourceUnreadable(
            f"{shown} cannot be observed: the server does not answer ({kind}); is it up?"
        ) from None


def _http_time(text: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(text) if text else None
    except ValueError:
        return None


def _unreadable(source: ExternalSource, reason: str) -> SourceUnreadable:
    told = reason.replace(source.read, source.uri).removeprefix("input 'source': ")
    return SourceUnreadable(f"{source.uri} cannot be observed: {told}")
