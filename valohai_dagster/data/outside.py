"""What files that are no datums held when they were last used, and whether that has changed since (I-32).

A store's version of an object is known, and compared, when an execution is created; checksums once a worker has the
content. Both only warn: the run goes on with what is there now.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from valohai_agent.protocol import Checksums, JobFile
from valohai_dagster.records.store import upsert
from valohai_dagster.records.tables import outside_files

CHUNK = 500  # rows of one statement
MAX_NAMED = 10  # changed files that are named one by one
_C = outside_files.c


def digest(uri: str) -> str:
    return hashlib.sha256(uri.encode("utf-8", "surrogatepass")).hexdigest()


def version_of(file: JobFile) -> str | None:
    """As its store calls the content of an outside file; None when nobody knows yet."""
    if file.datum_id is not None or file.cache_key is None:
        return None
    prefix = f"{file.uri}@"
    return file.cache_key.removeprefix(prefix)[:255] if file.cache_key.startswith(prefix) else None


def note_versions(
    connection: sa.Connection, files: Iterable[JobFile], *, execution_id: str, now: datetime
) -> list[str]:
    """Remembers the versions that an execution was created with; warnings for those that have changed."""
    versions = {file.uri: version for file in files if (version := version_of(file)) is not None}
    changed: list[str] = []
    uris = list(versions)
    for start in range(0, len(uris), CHUNK):
        part = uris[start : start + CHUNK]
        known = _known(connection, part)
        for uri in part:
            before = known.get(uri)
            if before is not None and before.version == versions[uri]:
                continue
            if before is not None and before.version is not None:
                changed.append(
                    f"{uri} has changed since it was last used: its version is {versions[uri]}, was {before.version}"
                )
            known_by = execution_id if before is None else before.execution_id
            _keep(connection, uri, version=versions[uri], execution_id=known_by, mtime=now)
    return _few(changed)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a worker has found under a URI."""

    uri: str
    checksums: Checksums
    size: int


def note_contents(
    connection: sa.Connection, found: Sequence[Found], *, execution_id: str, now: datetime
) -> list[str]:
    """Remembers what a worker has found; warnings where another execution found other content."""
    changed: list[str] = []
    by_uri = {one.uri: one for one in found if one.checksums.sha256 is not None}
    uris = list(by_uri)
    for start in range(0, len(uris), CHUNK):
        known = _known(connection, uris[start : start + CHUNK])
        for uri in uris[start : start + CHUNK]:
            before, sha256 = known.get(uri), by_uri[uri].checksums.sha256
            if before is not None and before.sha256 == sha256:
                continue
            content = {"sha256": sha256, "size": by_uri[uri].size}
            _keep(connection, uri, **content, execution_id=execution_id, mtime=now)
            if before is None or before.sha256 is None or before.execution_id == execution_id:
                continue
            changed.append(
                f"the content of {uri} differs from its last use by an earlier execution "
                f"({before.execution_id}): sha256 {sha256}, was {before.sha256}"
            )
    return _few(changed)


def _known(connection: sa.Connection, uris: Sequence[str]) -> dict[str, Any]:
    wanted = {digest(uri): uri for uri in uris}
    query = sa.select(outside_files).where(_C.digest.in_(list(wanted)))
    return {wanted[row.digest]: row for row in connection.execute(query)}


def _keep(connection: sa.Connection, uri: str, **values: Any) -> None:
    upsert(connection, outside_files, digest=digest(uri), uri=uri[:4096], **values)


def _few(changed: Sequence[str]) -> list[str]:
    if len(changed) <= MAX_NAMED:
        return list(changed)
    rest = len(changed) - MAX_NAMED
    return [*changed[:MAX_NAMED], f"{rest} further files have changed since their last use"]
