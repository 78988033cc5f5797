"""Keeps the log of an attempt whose worker is lost."""

from __future__ import annotations

import gzip
import json
import logging
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from valohai_agent.protocol import STATUS_PREFIX, LogStream
from valohai_dagster.errors import StoreError
from valohai_dagster.stores.base import Store

log = logging.getLogger(__name__)

_STREAMS = ("stdout", "stderr", "events")


def store_salvaged(
    files: dict[str, bytes], store: Store, prefix: str, *, complete: bool
) -> dict[str, Any]:
    """Stores what is known of a lost attempt's log and returns the entries for its record.

    A store that refuses leaves the live log as the only copy, for as long as that lives.
    """
    stored: dict[str, Any] = {}
    for stream, content in files.items():
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


def from_live(entries: Iterable[tuple[str, Mapping[str, str]]]) -> dict[str, bytes]:
    """The same files from the live log, which may have gaps; empty if there is none."""
    texts: dict[str, list[str]] = {"stdout": [], "stderr": []}
    events = []
    for _, fields in entries:
        stream, text = fields["s"], fields["m"]
        events.append(json.dumps({"time": fields["t"], "stream": stream, "message": text}))
        prefix = STATUS_PREFIX if stream == LogStream.status.value else ""
        target = "stdout" if stream == LogStream.stdout.value else "stderr"
        texts[target].append(f"{prefix}{text}\n")
    if not events:
        return {}
    content = {stream: "".join(lines).encode() for stream, lines in texts.items()}
    return {**content, "events": gzip.compress("\n".join(events).encode(), mtime=0)}
