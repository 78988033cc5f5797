"""Keeps the log of an attempt whose worker is lost."""

from __future__ import annotations

import gzip
import json
import logging
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from valohai_agent.protocol import STATUS_PREFIX, LogStream
from valohai_dagster.errors import StoreError
from valohai_dagster.stores.base import Store

log = logging.getLogger(__name__)

_STREAMS = ("stdout", "stderr", "events")


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


def store_salvaged(
    files: Mapping[str, bytes | Salvaged], store: Store, prefix: str, *, complete: bool
) -> dict[str, Any]:
    """Stores what is known of a lost attempt's log and returns the entries for its record.

    A store that refuses leaves the live log as the only copy, for as long as that lives.
    """
    stored: dict[str, Any] = {}
    for stream, found in files.items():
        content = bytes(found.content) if isinstance(found, Salvaged) else found
        key = f"{prefix}/{uuid.uuid4()}/{stream}"
        try:
            store.put(key, content)
        except StoreError as error:
            log.warning(
                "the log of a lost attempt cannot be stored: %s", error, extra={"action": "salvage"}
            )
            return {}
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


def from_files(directory: Path) -> dict[str, bytes]:
    """The complete log that a dead agent left on this host; empty if it left none."""
    found = {}
    for stream in _STREAMS:
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
