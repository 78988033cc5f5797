"""Where log sections come from: the records say what there is, Redis has the live end, a store the whole."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from valohai_dagster.errors import ValohaiError
from valohai_dagster.plugin.log_sections import STREAMS, LogSection, LogSource, StoredLog, Stream

if TYPE_CHECKING:
    from valohai_dagster.settings import Settings
    from valohai_dagster.stores.registry import Stores

log = logging.getLogger(__name__)

PAGE = 1_000  # live entries per read
HINTS = 2_000  # positions whose stream id is remembered
STATUS_PREFIX = b"[valohai] "


@dataclass(frozen=True, kw_only=True)
class LogIndex:
    """Everything the records know about the log behind one Dagster log key."""

    sections: tuple[LogSection, ...] = ()
    step_keys: frozenset[str] = frozenset()
    final: bool = True  # every execution has ended


@dataclass(frozen=True, kw_only=True)
class LiveLine:
    """One entry of the live log, decoded: `stream` is the file it belongs to."""

    stream: Stream
    text: bytes
    start: int
    end: int
    gap: int = 0  # lines that are left out here, and said to be


class ServiceLogs:
    """Reads records, Redis and stores of one deployment; each is opened when first needed."""

    def __init__(self, load: Callable[[], Settings]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._records: Any = None
        self._redis: Any = None
        self._stores: tuple[Settings, Stores] | None = None
        self._hints: OrderedDict[tuple[str, int, str, int], str] = OrderedDict()

    # -- what there is ------------------------------------------------------------------------------------------
    def index(self, log_key: Sequence[str]) -> LogIndex:
        """Sections in order of execution and attempt; an empty index when the key is not ours."""
        return self._index("log_key", "/".join(log_key))

    def index_of_execution(self, execution_id: str) -> LogIndex:
        return self._index("id", execution_id)

    def _index(self, column: str, value: str) -> LogIndex:
        import sqlalchemy as sa

        from valohai_dagster.records import tables as t

        query = (
            sa.select(
                t.executions,
                t.attempts.c.number,
                t.attempts.c.logs,
                t.attempts.c.ended_at.label("attempt_end"),
            )
            .select_from(
                t.executions.outerjoin(t.attempts, t.attempts.c.execution_id == t.executions.c.id)
            )
            .where(t.executions.c[column] == value)
            .order_by(t.executions.c.ctime, t.executions.c.counter, t.attempts.c.number)
        )
        with self.records().read() as connection:
            return index_of(connection.execute(query).all())

    def records(self) -> Any:
        from valohai_dagster.records.engine import open_records

        with self._lock:
            if self._records is None:
                self._records = open_records(self._load())
            return self._records

    def close(self) -> None:
        """Lets go of the records and of Redis; what is read afterwards opens them again."""
        with self._lock:
            records, self._records = self._records, None
            client, self._redis = self._redis, None
        if records is not None:
            records.close()
        if client is not None:
            client.close()

    # -- LogSource ----------------------------------------------------------------------------------------------
    def read(
        self, section: LogSection, stream: Stream, offset: int, limit: int | None
    ) -> tuple[bytes, int]:
        stored = section.stored.get(stream)
        if stored is not None:
            return self._stored(stored, offset, limit)
        if stream in section.removed:
            notice = removed_text(section.removed[stream])
            return notice[offset:], max(offset, len(notice))
        import redis

        try:
            return self._live(section, stream, offset, limit)
        except (redis.RedisError, ValohaiError, OSError) as error:
            # Redis is away: the view stands still, and goes on when it is back.
            extra = {"action": "outage", "step": "logs", "execution": section.execution_id}
            text = "live log of execution %s is not readable now: %s"
            log.warning(text, section.execution_id, error, extra=extra)
            self._redis = None
            return b"", offset

    def _stored(self, stored: StoredLog, offset: int, limit: int | None) -> tuple[bytes, int]:
        """`offset` counts in the whole log, as while it was live."""
        start = stored.in_file(offset)
        if start >= stored.size:
            return b"", max(offset, stored.end)
        try:
            with self.open_stored(stored, start) as file:
                data = read_whole_characters(file, limit)
        except (ValohaiError, OSError) as error:
            text = "stored log %s/%s is not readable: %s"
            log.warning(text, stored.store, stored.key, error, extra={"action": "read-log"})
            return b"", offset
        return data, stored.in_log(start + len(data))

    def open_stored(self, stored: StoredLog, offset: int = 0) -> BinaryIO:
        return self._open_stores()[stored.store].open(stored.key, offset=offset)

    def _open_stores(self) -> Stores:
        """Kept: a store of a cloud has a client, which is dear to make."""
        from valohai_dagster.stores.registry import open_stores

        settings = self._load()
        with self._lock:
            if self._stores is None or self._stores[0] is not settings:
                self._stores = (settings, open_stores(settings))
            return self._stores[1]

    def _live(
        self, section: LogSection, stream: Stream, offset: int, limit: int | None
    ) -> tuple[bytes, int]:
        """Never over a hole: a reader who has seen a part waits for the stored file, which has all of it in order.

        Whoever begins to read gets the lines that are there, and a word about those before them (M-03).
        """
        out = bytearray()
        hint = self._hints.get((section.execution_id, section.attempt, stream, offset))
        fresh = hint is None
        last = hint or "-"
        for entry_id, line in self._entries(section, last):
            last = entry_id
            if line.stream != stream or line.end <= offset:
                continue
            if line.start > offset > 0 and not line.gap:
                break
            if fresh and line.start > offset:
                out += f"[valohai] ... {line.start - offset} bytes are shown when the execution has ended ...\n".encode()
            fresh = False
            out += line.text
            offset = line.end
            if limit is not None and len(out) >= limit:
                break
        if last != "-":
            self._remember((section.execution_id, section.attempt, stream, offset), last)
        return bytes(out), offset

    def _entries(self, section: LogSection, after: str) -> Iterator[tuple[str, LiveLine]]:
        key = self._keys().log(section.group, section.execution_id, section.attempt)
        minimum = "-" if after == "-" else f"({after}"
        while True:
            page: Any = self._client().xrange(key, min=minimum, count=PAGE)
            for entry_id, fields in page:
                yield _text(entry_id), live_line(fields)
            if len(page) < PAGE:
                return
            minimum = f"({_text(page[-1][0])}"

    def _remember(self, key: tuple[str, int, str, int], entry_id: str) -> None:
        with self._lock:
            self._hints[key] = entry_id
            self._hints.move_to_end(key)
            while len(self._hints) > HINTS:
                self._hints.popitem(last=False)

    def _client(self) -> Any:
        if self._redis is None:
            from valohai_dagster.broker.connection import connect

            self._redis = connect(self._load())
        return self._redis

    def _keys(self) -> Any:
        from valohai_agent.protocol import Keys

        return Keys(self.records().deployment_id)


def index_of(rows: Iterable[Any]) -> LogIndex:
    """Rows of executions joined with their attempts, in order."""
    rows = list(rows)
    finals = {"stopped", "error", "crashed", "complete"}
    sections = [section_of(row, finals) for row in rows if row.number is not None]
    return LogIndex(
        sections=tuple(sections),
        step_keys=frozenset(row.step_key for row in rows if row.step_key),
        final=all(row.status in finals for row in rows),
    )


def section_of(row: Any, finals: set[str]) -> LogSection:
    logs = row.logs or {}
    stored = {
        name: StoredLog(
            store=entry["store"],
            key=entry["key"],
            size=int(entry["size"]),
            pieces=tuple((int(log), int(file)) for log, file in entry.get("pieces", ())),
        )
        for name in STREAMS
        if (entry := logs.get(name)) and entry.get("key")
    }
    removed = {
        name: str(entry["removed_at"])
        for name in STREAMS
        if (entry := logs.get(name)) and entry.get("removed_at")
    }
    retry = f", retry {row.retry_number}" if row.retry_number else ""
    return LogSection(
        execution_id=row.id,
        attempt=row.number,
        title=f"{row.step}: execution #{row.counter}{retry}, attempt {row.number}",
        group=row.group_name,
        stored=stored,
        removed=removed,
        ended=row.attempt_end is not None or row.status in finals,
    )


def live_line(fields: Any) -> LiveLine:
    """Status lines are part of the stored stderr file, prefixed there as here."""
    values = {_text(k): v for k, v in fields.items()}
    kind = _text(values.get("s", "stdout"))
    text = values.get("m", b"")
    data = text.encode("utf-8", "replace") if isinstance(text, str) else bytes(text)
    if kind == "status" and not data.startswith(STATUS_PREFIX):
        data = STATUS_PREFIX + data
    start, end, gap = (int(_text(values.get(name, 0)) or 0) for name in ("o", "e", "g"))
    if gap and not data.strip():
        data = (
            STATUS_PREFIX
            + f"... {gap} lines are left out here, the complete log has them ...".encode()
        )
    return LiveLine(
        stream="stdout" if kind == "stdout" else "stderr",
        text=data + b"\n",
        start=start,
        end=end,
        gap=gap,
    )


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def last_lines(source: LogSource, section: LogSection, count: int, size: int) -> list[str]:
    """The last lines of stderr without the platform's own."""
    stored = section.stored.get("stderr")
    start = stored.in_log(max(0, stored.size - size)) if stored else 0
    data, _ = source.read(section, "stderr", start, None)
    lines = data[-size:].decode("utf-8", "replace").splitlines()
    if start and len(lines) > 1:
        lines = lines[1:]  # most likely cut
    return [line for line in lines if not line.startswith(STATUS_PREFIX.decode())][-count:]


def removed_text(when: str) -> bytes:
    """What stands where a log was."""
    return STATUS_PREFIX + f"this log was removed by retention on {when[:10]}\n".encode()


def read_whole_characters(file: BinaryIO, limit: int | None) -> bytes:
    """About `limit` bytes, ending on a whole UTF-8 character. The file may be a stream that gives less at a time."""
    if limit is None:
        return file.read()
    data = b""
    while len(data) < limit and (more := file.read(limit - len(data))):
        data += more
    for _ in range(3):  # a character has at most three continuation bytes
        following = file.read(1)
        if not following or following[0] & 0xC0 != 0x80:
            break
        data += following
    return data
