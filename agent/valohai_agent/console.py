"""Turns the command's bytes into complete log files, live lines and metadata (CONTRACT 7.1, 7.2)."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from valohai_agent.clock import Clock
from valohai_agent.metadata import MAX_METADATA_BYTES, parse_metadata
from valohai_agent.protocol import (
    LOG_EVENTS_PER_WINDOW,
    LOG_WINDOW_SECONDS,
    MAX_LOG_MESSAGE_BYTES,
    STATUS_PREFIX,
    LogLine,
    LogStream,
)

FLUSH_SECONDS = 1.0  # M-05: a progress bar costs one message per second
PARTIAL_SECONDS = 5.0  # a line without its end is shown after this long a silence
TAIL_LINES = 200
MASK = b"***"
MIN_SECRET_CHARACTERS = 6  # K-74


@dataclass(frozen=True, kw_only=True)
class LogFile:
    """One complete log on disk. `events` is gzip-compressed when the console closes."""

    path: Path
    size: int
    lines: int


@dataclass
class _Limit:
    """M-02 for one stream: 500 events per window of 10 seconds in the live view."""

    window_start: float = float("-inf")
    shown: int = 0
    warned: bool = False
    gap: int = 0
    gap_start: int = 0
    gap_end: int = 0


@dataclass
class _Stream:
    """What is known about one of the user's streams."""

    stream: LogStream
    file: _CountingFile
    buffer: bytearray = field(default_factory=bytearray)
    limit: _Limit = field(default_factory=_Limit)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    long_line: bytearray | None = None  # start of a split line that may be metadata
    in_long_line: bool = False
    shown_partly: bool = False
    last_shown: float = 0.0
    last_bytes: float = 0.0


class _CountingFile:
    """An unbuffered file that knows its size without asking the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.lines = 0
        self._file: IO[bytes] = path.open("wb", buffering=0)

    def write(self, data: bytes, lines: int) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) or 0 :]
        self.size += len(data)
        self.lines += lines

    def close(self) -> None:
        self._file.close()


class Console:
    """Safe to feed from several threads.

    The stored files are complete; the live lines obey M-02 with gap markers; metadata is read before
    that limit, so that a fast printer loses none (stated deviation from M-19). `sink` and
    `on_metadata` are called while a lock is held, from the feeding thread: they must only queue. Call
    `tick()` about once a second, so that a progress bar, a prompt without its line end and the gap
    markers become visible while nothing else is printed.

    If the disk is full, the files stop growing, the live view goes on, and `close` says so by
    `write_error`; the command is never blocked or ended by it.
    """

    def __init__(
        self,
        log_dir: Path,
        sink: Callable[[list[LogLine]], None],
        on_metadata: Callable[[list[dict[str, Any]]], None],
        clock: Clock,
        secrets: Iterable[str] = (),
    ) -> None:
        self._sink = sink
        self._on_metadata = on_metadata
        self._clock = clock
        self._lock = threading.RLock()
        self._streams = {
            name: _Stream(LogStream(name), _CountingFile(log_dir / name))
            for name in ("stdout", "stderr")
        }
        self._events = _CountingFile(log_dir / "events")
        self._secrets: set[bytes] = set()
        self._pattern: re.Pattern[bytes] | None = None
        self._longest_secret = 0
        self._live: list[LogLine] = []
        self._metadata: list[dict[str, Any]] = []
        self._event_lines: list[bytes] = []
        self._closed: dict[str, LogFile] | None = None
        self.write_error: str | None = None
        self.last_output_at = clock.monotonic()
        self.add_secrets(secrets)

    def add_secrets(self, secrets: Iterable[str]) -> None:
        """Masks these values from now on: exact values of six and more characters become `***` (K-74).

        A value of several lines is masked line by line as well.
        """
        with self._lock:
            for secret in secrets:
                for part in (secret, *secret.splitlines()):
                    if len(part.strip()) >= MIN_SECRET_CHARACTERS:
                        self._secrets.add(part.strip().encode("utf-8", "surrogateescape"))
            if self._secrets:
                longest_first = sorted(self._secrets, key=len, reverse=True)
                self._pattern = re.compile(b"|".join(map(re.escape, longest_first)))
                self._longest_secret = len(longest_first[0])

    def feed(self, stream: str, data: bytes) -> None:
        """Takes raw bytes of `stdout` or `stderr` as they come."""
        if not data:
            return
        with self._lock:
            if self._closed is not None:
                return
            state = self._streams[stream]
            self.last_output_at = state.last_bytes = self._clock.monotonic()
            state.buffer += data
            self._take_lines(state)
            self._flush()

    def status(self, message: str) -> None:
        """Writes a line of the platform; several lines when the message has newlines.

        It lands in the `stderr` file behind STATUS_PREFIX, never inside a line of the user.
        """
        with self._lock:
            if self._closed is None:
                self._status(message)
                self._flush()

    def tick(self) -> None:
        """Shows what waits for the flush interval."""
        with self._lock:
            if self._closed is not None:
                return
            now = self._clock.monotonic()
            for state in self._streams.values():
                self._show_partial(state, now)
                if now - state.limit.window_start >= LOG_WINDOW_SECONDS:
                    self._end_gap(state)
            self._flush()

    def touch(self) -> None:
        """Restarts the silence measured by `last_output_at`, when the command starts (M-31)."""
        self.last_output_at = self._clock.monotonic()

    def tail(self, stream: str, lines: int = 20) -> list[str]:
        """Last lines of a stream, masked, for failure messages."""
        with self._lock:
            return list(self._streams[stream].tail)[-lines:]

    def close(self) -> dict[str, LogFile]:
        """Ends unfinished lines and closes the files; gives them by name. Idempotent."""
        with self._lock:
            self.end_output()
            if self._closed is None:
                self._closed = self._close_files()
            return self._closed

    def end_output(self) -> None:
        """The command is over: ends its unfinished lines, before the status lines that follow."""
        with self._lock:
            if self._closed is not None:
                return
            for state in self._streams.values():
                if state.buffer or state.in_long_line:
                    self._take_region(state, bytes(state.buffer))
                    state.buffer.clear()
                self._end_gap(state)
            self._flush()

    # -- from bytes to lines -----------------------------------------------------------------------
    def _take_lines(self, state: _Stream) -> None:
        end = state.buffer.rfind(b"\n") + 1
        if end:
            region = bytes(state.buffer[:end])
            del state.buffer[:end]
            self._take_region(state, region)
        while len(state.buffer) > MAX_LOG_MESSAGE_BYTES + self._longest_secret:
            self._split(state)

    def _split(self, state: _Stream) -> None:
        """Takes 64 KiB of a line without end (M-06), never cutting a secret or a character."""
        masked = self._mask(bytes(state.buffer))
        if len(masked) <= MAX_LOG_MESSAGE_BYTES + self._longest_secret:
            state.buffer[:] = masked
            return
        cut = _character_boundary(masked, MAX_LOG_MESSAGE_BYTES)
        state.buffer[:] = masked[cut:]
        self._take_piece(state, masked[:cut])

    def _take_region(self, state: _Stream, region: bytes) -> None:
        """Stores a run of complete lines (at the very end perhaps one without its newline)."""
        masked = self._mask(region)
        offset = state.file.size
        lines = masked.split(b"\n")
        last = lines.pop()
        self._write(state.file, masked, len(lines) + bool(last))
        for line in lines:
            self._take_line(state, line, offset, offset + len(line) + 1)
            offset += len(line) + 1
        if last:
            self._take_line(state, last, offset, offset + len(last))

    def _take_line(self, state: _Stream, line: bytes, start: int, end: int) -> None:
        """One line's end: metadata is read from all of it, shown is what was not shown before."""
        self._remember(state, line)
        if state.long_line:
            event = parse_metadata(bytes(state.long_line))
            if event is not None:
                self._metadata.append({**event, "_time": self._time()})
        continues, state.in_long_line, state.long_line = state.in_long_line, False, None
        if continues and state.shown_partly and not line.strip(b"\r"):
            state.shown_partly = False
            return
        state.shown_partly = False
        for first in range(0, max(len(line), 1), MAX_LOG_MESSAGE_BYTES):
            piece = line[first : first + MAX_LOG_MESSAGE_BYTES]
            stop = start + first + len(piece)
            self._show(state, _text(piece), start + first, end if stop >= end - 1 else stop)

    def _take_piece(self, state: _Stream, piece: bytes) -> None:
        """Stores and shows a part of a line whose end has not come."""
        self._remember(state, piece)
        state.shown_partly = True
        start = state.file.size
        self._write(state.file, piece, 0)
        self._show(state, _text(piece), start, state.file.size)

    def _remember(self, state: _Stream, piece: bytes) -> None:
        """Keeps what may be metadata: all since the line's start or its last carriage return (M-11)."""
        fresh = not state.in_long_line
        state.in_long_line = True
        if state.stream is not LogStream.stdout:
            return
        if fresh or b"\r" in piece.rstrip(b"\r"):
            state.long_line = bytearray()
        if state.long_line is None:
            return
        state.long_line += piece
        starts = state.long_line.rstrip(b"\r").rpartition(b"\r")[2].lstrip()[:1]
        if starts not in (b"", b"{", b"\x1b") or len(state.long_line) > MAX_METADATA_BYTES:
            state.long_line = None

    def _show_partial(self, state: _Stream, now: float) -> None:
        """Shows a progress bar's newest state, or a line whose end does not come."""
        bar = b"\r" in state.buffer
        since = state.last_shown if bar else state.last_bytes
        if not state.buffer or now - since < (FLUSH_SECONDS if bar else PARTIAL_SECONDS):
            return
        cut = state.buffer.rfind(b"\r") + 1 if bar else len(state.buffer)
        if bar and cut == len(state.buffer):
            cut -= 1  # its newline may follow, and `\r\n` is one line end
        if not cut or self._may_cut_secret(state.buffer, cut):
            return
        piece = self._mask(bytes(state.buffer[:cut]))
        del state.buffer[:cut]
        state.last_shown = now
        self._take_piece(state, piece)

    # -- masking -----------------------------------------------------------------------------------
    def _mask(self, data: bytes) -> bytes:
        return self._pattern.sub(MASK, data) if self._pattern is not None else data

    def _may_cut_secret(self, data: bytearray, cut: int) -> bool:
        """Whether a secret may begin before `cut` and go on, perhaps in bytes still to come."""
        for secret in self._secrets:
            for length in range(1, len(secret)):
                if data[max(0, cut - length) : cut] == secret[:length]:
                    rest = bytes(data[cut : cut + len(secret) - length])
                    if secret[length:].startswith(rest):
                        return True
        return False

    # -- what is shown live ------------------------------------------------------------------------
    def _show(self, state: _Stream, message: str, start: int, end: int) -> None:
        state.tail.append(message)
        time = self._time()
        self._add_event(state.stream, time, message)
        limit = state.limit
        now = self._clock.monotonic()
        if now - limit.window_start >= LOG_WINDOW_SECONDS:
            self._end_gap(state)
            limit.window_start, limit.shown = now, 0
        if limit.shown < LOG_EVENTS_PER_WINDOW:
            limit.shown += 1
            self._live.append(LogLine(s=state.stream, t=time, m=message, o=start, e=end))
            return
        if not limit.gap:
            limit.gap_start = start
        limit.gap, limit.gap_end = limit.gap + 1, end

    def _end_gap(self, state: _Stream) -> None:
        limit = state.limit
        if not limit.gap:
            return
        self._live.append(
            LogLine(
                s=state.stream,
                t=self._time(),
                m=f"... {limit.gap} lines are only in the stored log ...",
                o=limit.gap_start,
                e=limit.gap_end,
                g=limit.gap,
            )
        )
        limit.gap = 0

    def _status(self, message: str) -> None:
        stderr = self._streams["stderr"]
        self._break_line(stderr)
        masked = _text(self._mask(message.encode("utf-8", "replace")))
        for line in masked.splitlines() or [""]:
            self._status_line(stderr, line)

    def _break_line(self, stderr: _Stream) -> None:
        """Keeps status lines out of the middle of a line that is partly in the file already."""
        if stderr.in_long_line:
            self._write(stderr.file, b"\n", 1)
            stderr.in_long_line = stderr.shown_partly = False

    def _status_line(self, stderr: _Stream, line: str) -> None:
        stored = (STATUS_PREFIX + line + "\n").encode()
        start = stderr.file.size
        self._write(stderr.file, stored, 1)
        time = self._time()
        self._add_event(LogStream.status, time, line)
        end = stderr.file.size
        self._live.append(LogLine(s=LogStream.status, t=time, m=line, o=start, e=end))

    def _warn_once(self) -> None:
        for state in self._streams.values():
            if state.limit.gap and not state.limit.warned:
                state.limit.warned = True
                rate = LOG_EVENTS_PER_WINDOW / LOG_WINDOW_SECONDS
                self._status(
                    f"More than {rate:.1f} events per second are being written to "
                    f"{state.stream.value}; some are ignored."
                )

    # -- files -------------------------------------------------------------------------------------
    def _write(self, file: _CountingFile, data: bytes, lines: int) -> None:
        try:
            file.write(data, lines)
        except OSError as error:
            self.write_error = self.write_error or f"the log cannot be written: {error.strerror}"

    def _add_event(self, stream: LogStream, time: str, message: str) -> None:
        event = {"time": time, "stream": stream.value, "message": message}
        self._event_lines.append(json.dumps(event).encode() + b"\n")

    def _flush(self) -> None:
        self._warn_once()
        if self._event_lines:
            self._write(self._events, b"".join(self._event_lines), len(self._event_lines))
            self._event_lines = []
        if self._metadata:
            events, self._metadata = self._metadata, []
            self._on_metadata(events)
        if self._live:
            lines, self._live = self._live, []
            self._sink(lines)

    def _close_files(self) -> dict[str, LogFile]:
        files = {**{name: s.file for name, s in self._streams.items()}, "events": self._events}
        for file in files.values():
            file.close()
        result = {
            name: LogFile(path=file.path, size=file.size, lines=file.lines)
            for name, file in files.items()
        }
        try:
            result["events"] = _compressed(result["events"])
        except OSError as error:
            self.write_error = self.write_error or f"the log cannot be written: {error.strerror}"
        return result

    def _time(self) -> str:
        return stamp(self._clock.now())


def stamp(moment: datetime) -> str:
    """M-01: UTC ISO 8601 with microseconds, no offset."""
    return moment.replace(tzinfo=None).isoformat(timespec="microseconds")


def _text(piece: bytes) -> str:
    """What a terminal would show in the end: the text after the last carriage return (M-05)."""
    return piece.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")


def _character_boundary(data: bytes, cut: int) -> int:
    """The last place at or before `cut` that is not inside a UTF-8 character."""
    for step in range(min(4, cut)):
        if cut - step >= len(data) or data[cut - step] & 0xC0 != 0x80:
            return cut - step
    return cut


def _compressed(events: LogFile) -> LogFile:
    target = events.path.with_suffix(".gz")
    with events.path.open("rb") as source, gzip.open(target, "wb", compresslevel=6) as out:
        shutil.copyfileobj(source, out)
    return LogFile(path=target, size=target.stat().st_size, lines=events.lines)
