"""Keeps the log of an attempt whose worker is lost."""

from __future__ import annotations

import gzip
import json
import logging
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valohai_agent.protocol import STATUS_PREFIX, LogStream
from valohai_dagster.errors import StoreError
from valohai_dagster.executions import ledger

if TYPE_CHECKING:
    from valohai_dagster.executions.service import ExecutionService

log = logging.getLogger(__name__)

_STREAMS = ("stdout", "stderr", "events")


async def salvage_logs(service: ExecutionService, active: ledger.Active) -> dict[str, Any]:
    """Stores what is known of the lost attempt's log and returns the entries for its record.

    A dead agent of a local group left complete files on this host; of any other worker there is the live log,
    which may have gaps. A store that refuses leaves the live log as the only copy, for a day.
    """
    local = service.groups.get(active.group)
    files = _read_files(local.attempt_logs(active.id, active.attempt)) if local else {}
    if not files:
        files = await _read_live(service, active)
    row = await service.read(lambda conn: ledger.row_of(conn, active.id))
    stored: dict[str, Any] = {}
    for stream, content in files.items():
        key = f"logs/{row.project_id}/{active.id}/{active.attempt}/{uuid.uuid4()}/{stream}"
        store = service.settings.log_store_name
        try:
            service.stores[store].put(key, content)
        except StoreError as error:
            log.warning("the log of a lost attempt cannot be stored: %s", error, extra={"action": "salvage"})
            return {}
        lines = content.count(b"\n") if stream != "events" else 0
        stored[stream] = {"store": store, "key": key, "size": len(content), "lines": lines, "complete": bool(local)}
    return stored


def _read_files(directory: Path) -> dict[str, bytes]:
    found = {}
    for stream in _STREAMS:
        try:
            content = (directory / stream).read_bytes()
        except OSError:
            continue
        found[stream] = gzip.compress(content, mtime=0) if stream == "events" else content
    return found


async def _read_live(service: ExecutionService, active: ledger.Active) -> dict[str, bytes]:
    key = service.keys.log(active.group, active.id, active.attempt)
    texts: dict[str, list[str]] = {"stdout": [], "stderr": []}
    events = []
    for _, fields in await service.dispatch.redis.xrange(key):
        stream, text = fields["s"], fields["m"]
        events.append(json.dumps({"time": fields["t"], "stream": stream, "message": text}))
        prefix = STATUS_PREFIX if stream == LogStream.status.value else ""
        target = "stdout" if stream == LogStream.stdout.value else "stderr"
        texts[target].append(f"{prefix}{text}\n")
    if not events:
        return {}
    content = {stream: "".join(lines).encode() for stream, lines in texts.items()}
    return {**content, "events": gzip.compress("\n".join(events).encode(), mtime=0)}
