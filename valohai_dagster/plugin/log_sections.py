"""Reading the log of one Dagster step as a row of sections, one per attempt of its executions.

Pure bookkeeping between a cursor and a `LogSource`. A section is read live while its attempt runs and from the
stored file afterwards; offsets are byte offsets in the stored file in both cases, so the hand-over loses nothing
and repeats nothing.

Cursor: `v1/<section>/<stdout>/<stderr>` with the offsets within that section, and behind another `/` the offsets
in the local capture (`12:0`, Dagster's own form) where that is shown too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

Stream = Literal["stdout", "stderr"]
STREAMS: tuple[Stream, Stream] = ("stdout", "stderr")
PIECE = 1 << 20  # bytes read at a time


@dataclass(frozen=True, kw_only=True)
class StoredLog:
    """`size` is the file's. `pieces` tell where a salvaged log lacks bytes, see `executions.salvage.Salvaged`."""

    store: str
    key: str
    size: int
    pieces: tuple[tuple[int, int], ...] = ()

    @property
    def end(self) -> int:
        """The offset behind the last byte, as the live log counts."""
        return self.in_log(self.size)

    def in_file(self, offset: int) -> int:
        """Where the byte of the whole log lies in the file; behind the word about it if it is lost."""
        log, file = (0, 0)
        for start, at in self.pieces:
            if offset < start:
                return min(file + offset - log, at)
            log, file = start, at
        return file + offset - log

    def in_log(self, offset: int) -> int:
        log, file = next((piece for piece in reversed(self.pieces) if piece[1] <= offset), (0, 0))
        return log + offset - file


@dataclass(frozen=True, kw_only=True)
class LogSection:
    """One attempt. `ended`: its live log grows no more."""

    execution_id: str
    attempt: int
    title: str = ""
    group: str = ""
    stored: Mapping[str, StoredLog] = field(default_factory=dict)
    removed: Mapping[str, str] = field(default_factory=dict)  # stream -> when retention deleted it
    ended: bool = False


class LogSource(Protocol):
    def read(
        self, section: LogSection, stream: Stream, offset: int, limit: int | None
    ) -> tuple[bytes, int]:
        """Bytes from that offset on, at most about `limit` (more to finish a line), and the offset after them."""
        ...


@dataclass(frozen=True, kw_only=True)
class Position:
    section: int = 0
    stdout: int = 0
    stderr: int = 0
    local: str | None = None  # cursor of the local capture

    def __str__(self) -> str:
        own = f"v1/{self.section}/{self.stdout}/{self.stderr}"
        return f"{own}/{self.local}" if self.local else own

    @classmethod
    def parse(cls, cursor: str | None) -> Position:
        """The start for no cursor; `12:0` alone is a view that began before the execution existed."""
        match = re.fullmatch(r"v1/(\d+)/(\d+)/(\d+)(?:/(\d+:\d+))?", cursor or "")
        if match is None:
            return cls(local=cursor if re.fullmatch(r"\d+:\d+", cursor or "") else None)
        section, stdout, stderr = map(int, match.groups()[:3])
        return cls(section=section, stdout=stdout, stderr=stderr, local=match.group(4))


@dataclass(frozen=True, kw_only=True)
class Chunk:
    stdout: bytes
    stderr: bytes
    position: Position


def read_sections(
    sections: Sequence[LogSection], cursor: str | None, source: LogSource, limit: int | None
) -> Chunk:
    """Everything there is after the cursor, across sections.

    Stops early only when one stream has reached `limit`, because Dagster's subscriptions ask again at once only
    after a full chunk.
    """
    at = Position.parse(cursor)
    out: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
    while at.section < len(sections):
        section = sections[at.section]
        more = False
        for stream in STREAMS:
            room = None if limit is None else limit - len(out[stream])
            if room is not None and room <= 0:
                more = True
                continue
            data, after = source.read(section, stream, getattr(at, stream), room)
            out[stream] += data
            at = replace(at, **{stream: after})
            more = more or (room is not None and len(data) >= room)
        if more or not _finished(section, at) or at.section + 1 >= len(sections):
            break
        at = Position(section=at.section + 1, local=at.local)
        for stream in STREAMS:
            out[stream] += _divider(out[stream], sections[at.section])
    return Chunk(stdout=bytes(out["stdout"]), stderr=bytes(out["stderr"]), position=at)


def stream_from(
    sections: Sequence[LogSection], stream: Stream, source: LogSource, offset: int = 0
) -> Iterator[bytes]:
    """One stream of all sections as one file, from an offset on, a piece at a time; as `read_sections` joins them."""
    last = bytearray()
    for number, section in enumerate(sections):
        if number:
            divider = _divider(last, section)
            if offset < len(divider):
                yield divider[offset:]
            offset, last = max(0, offset - len(divider)), bytearray(divider)
        stored = section.stored.get(stream)
        if stored is not None and offset >= stored.size:
            offset -= stored.size
            before_last = stored.in_log(max(0, stored.size - 1))
            last = bytearray(source.read(section, stream, before_last, 1)[0])
            continue
        at, offset = (stored.in_log(offset), 0) if stored is not None else (0, offset)
        while True:
            data, at = source.read(section, stream, at, PIECE)
            if not data:
                break
            if offset < len(data):
                yield data[offset:]
            last, offset = bytearray(data[-1:]), max(0, offset - len(data))


def _finished(section: LogSection, at: Position) -> bool:
    """Whether nothing more can come from a section: its stored files are read, or its attempt is over."""
    if not section.ended:
        return False
    return all(getattr(at, s) >= section.stored[s].end for s in STREAMS if s in section.stored)


def _divider(before: bytearray, section: LogSection) -> bytes:
    start = b"\n" if before and not before.endswith(b"\n") else b""
    return start + f"[valohai] ---- {section.title} ----\n".encode()
