"""Keeps the log of an attempt whose agent did not store it: its worker is lost, or its store was away.

Keys are in the records before the first byte goes out, so that the sweep removes what nobody came to record.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa

from valohai_agent.protocol import STATUS_PREFIX, LogStream
from valohai_dagster.data import own_uploads
from valohai_dagster.errors import StoreConflict, StoreError
from valohai_dagster.executions import ledger
from valohai_dagster.executions.core import ServiceCore
from valohai_dagster.stores.base import Store

log = logging.getLogger(__name__)

STREAMS = ("stdout", "stderr", "events")


class Supervisor(Protocol):
    """What a group on this host knows of its agents."""

    def attempt_logs(self, execution_id: str, attempt: int) -> Path: ...


@dataclass
class Salvaged:
    """What is left of one stream. `pieces` say where bytes are missing.

    Each is (offset in the whole log, offset in this file) of a place from which on both run side by side, so that
    whoever has read the live log goes on at the right byte. Empty: the file is the log from its first byte on.
    """

    content: bytearray = field(default_factory=bytearray)
    pieces: list[tuple[int, int]] = field(default_factory=list)
    _position: int = 0  # in the whole log

    def add(self, text: bytes, start: int, end: int) -> None:
        """A line of the live log with its place in the whole; one that came twice counts once."""
        if end <= self._position and end > 0:
            return
        if start > self._position:
            self._lost(start - self._position)
        self.content += text
        self._position += len(text)
        if self._position != end > 0:  # a marker, or a line that was cut for the live view
            self.pieces.append((end, len(self.content)))
            self._position = end

    def _lost(self, count: int) -> None:
        self.content += STATUS_PREFIX.encode() + f"... {count} bytes are lost ...\n".encode()
        self._position += count
        self.pieces.append((self._position, len(self.content)))


async def salvage(
    core: ServiceCore,
    groups: Mapping[str, Supervisor],
    *,
    group: str,
    execution_id: str,
    attempt: int,
    streams: Collection[str] = STREAMS,
) -> dict[str, Any] | None:
    """Stores the agent's own files if it ran on this host, else what arrived of its live log.

    Gives the entries for the attempt's record, fewer than there could be while the store refuses; None if nothing is
    left to be stored. Who records them says so by `recorded`, in the same transaction.
    """
    local = groups.get(group)
    left = local.attempt_logs(execution_id, attempt) if local else None
    files: Mapping[str, bytes | Salvaged] = {}
    if left is not None:
        files = await asyncio.to_thread(from_files, left)
    complete = bool(files)
    if not files:
        live = core.keys.log(group, execution_id, attempt)
        entries: Any = await core.dispatch.redis.xrange(live)
        files = from_live(entries)
    wanted = {stream: files[stream] for stream in streams if stream in files}
    if not wanted:
        return None
    details = await core.read(lambda conn: ledger.details_of(conn, execution_id))
    prefix = f"logs/{details.project_id}/{execution_id}/{attempt}"
    try:
        store = core.stores[core.settings.log_store_name]
    except StoreError as error:
        text = "the log of an attempt cannot be stored for now: %s"
        log.warning(text, error, extra={"action": "salvage", "execution": execution_id})
        return {}
    keys = await core.write(
        lambda conn: own_uploads.log_keys(
            conn,
            execution_id=execution_id,
            attempt=attempt,
            prefix=prefix,
            streams=list(wanted),
            store=store.name,
            now=core.clock(),
        )
    )
    return await asyncio.to_thread(_store, wanted, store, keys, complete=complete)


def recorded(conn: sa.Connection, logs: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the caller's transaction may record; an object that is being removed already is none of them."""
    good = own_uploads.settle(conn, [log["key"] for log in logs.values()])
    return {stream: log for stream, log in logs.items() if log["key"] in good}


def _store(
    files: Mapping[str, bytes | Salvaged], store: Store, keys: Mapping[str, str], *, complete: bool
) -> dict[str, Any]:
    """Stores what is known of an attempt's log and returns the entries for its record.

    A store that refuses leaves the live log as the only copy, for as long as that lives; `LateLogs` tries again.
    """
    stored: dict[str, Any] = {}
    for stream, found in files.items():
        content = bytes(found.content) if isinstance(found, Salvaged) else found
        key = keys[stream]
        try:
            _put(store, key, content)
        except StoreError as error:
            text = "the log %s of an attempt cannot be stored for now: %s"
            log.warning(text, stream, error, extra={"action": "salvage"})
            return stored
        lines = content.count(b"\n") if stream != "events" else 0
        stored[stream] = {
            "store": store.name,
            "key": key,
            "size": len(content),
            "lines": lines,
            "complete": complete,
        }
        if isinstance(found, Salvaged) and found.pieces:
            stored[stream]["pieces"] = found.pieces
    return stored


def _put(store: Store, key: str, content: bytes) -> None:
    """An earlier try may have stored it and not have heard so, or its process died then; nobody knows of that object."""
    try:
        store.put(key, content)
    except StoreConflict:
        store.delete(key)
        store.put(key, content)


def from_files(directory: Path) -> dict[str, bytes]:
    """The complete log that an agent left on this host; empty if it left none."""
    found = {}
    for stream in STREAMS:
        try:
            content = (directory / stream).read_bytes()
        except OSError:
            continue
        found[stream] = gzip.compress(content, mtime=0) if stream == "events" else content
    return found


def from_live(entries: Iterable[tuple[str, Mapping[str, str]]]) -> dict[str, bytes | Salvaged]:
    """The same files from the live log, which may have gaps; empty if there is none."""
    texts = {"stdout": Salvaged(), "stderr": Salvaged()}
    events = []
    for _, fields in entries:
        stream, text = fields["s"], fields["m"]
        events.append(json.dumps({"time": fields["t"], "stream": stream, "message": text}))
        prefix = STATUS_PREFIX if stream == LogStream.status.value else ""
        target = "stdout" if stream == LogStream.stdout.value else "stderr"
        line = f"{prefix}{text}\n".encode()
        texts[target].add(line, int(fields.get("o", 0)), int(fields.get("e", 0)))
    if not events:
        return {}
    return {**texts, "events": gzip.compress("\n".join(events).encode(), mtime=0)}
