"""How the commands write sizes, durations, phases and values for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from valohai_agent.checksums import decimal_size
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView

STYLE = {
    ExecutionStatus.complete: "green",
    ExecutionStatus.error: "red",
    ExecutionStatus.crashed: "red",
    ExecutionStatus.stopped: "yellow",
    ExecutionStatus.stopping: "yellow",
    ExecutionStatus.stopping_hard: "yellow",
}


def size_text(size: int | None) -> str:
    """As the logs of inputs have them (I-31); `?` for one that nobody knows.

    >>> size_text(70591)
    '70.6 kB'
    """
    return "?" if size is None else decimal_size(size)


def counted(count: int, what: str) -> str:
    """
    >>> counted(1, "file"), counted(2000, "file")
    ('1 file', '2,000 files')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def cell_text(value: Any) -> str:
    """A value of our JSON for people: lists with commas, objects as JSON, `-` where there is none.

    >>> cell_text(["a", "b"]), cell_text({"k": None}), cell_text(True), cell_text(None)
    ('a, b', '{"k": null}', 'yes', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and not any(isinstance(one, (list, dict)) for one in value):
        return ", ".join(map(cell_text, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)


def seconds_text(seconds: float | None) -> str:
    """
    >>> seconds_text(0.42), seconds_text(63.2), seconds_text(3725)
    ('0.4 s', '1 min 3 s', '1 h 2 min')
    """
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def value_text(value: Any) -> str:
    """One metric value, floats without noise digits."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def metrics_text(values: Mapping[str, Any]) -> str:
    """`epoch=3 loss=0.12`; nested values and our own `_time` stay out."""
    shown = {k: v for k, v in values.items() if k != "_time" and not isinstance(v, (dict, list))}
    return " ".join(f"{name}={value_text(value)}" for name, value in shown.items())


def status_text(status: ExecutionStatus) -> str:
    """With rich's colour tags."""
    style = STYLE.get(status)
    return f"[{style}]{status.value}[/{style}]" if style else status.value


def total_seconds(view: ExecutionView) -> float | None:
    return _between(view.ctime, view.ended_at)


def _between(start: datetime | None, end: datetime | None) -> float | None:
    return (end - start).total_seconds() if start and end else None


def in_columns(rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> list[str]:
    """Rows as aligned text of any length; unlike a rich table, nothing is ever cut.

    >>> in_columns([["a", "1 B"], ["bcd", "10 B"]], right=frozenset({1}))
    ['a     1 B', 'bcd  10 B']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
