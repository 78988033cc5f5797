"""CPU and memory of a process and its children, from /proc. Linux only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of all processes together. Pages that several of them share count once in `pss`, each time in `rss`."""

    rss_bytes: int
    pss_bytes: int


def tree(pid: int) -> Iterator[int]:
    """The process and everything below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue
        for child in children:
            yield from tree(int(child))


def memory(pid: int) -> Memory:
    """Processes that end meanwhile count as nothing."""
    rss = pss = 0
    for one in tree(pid):
        try:
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:
            continue
        values = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
        rss += int(values["Rss"]) * 1024
        pss += int(values["Pss"]) * 1024
    return Memory(rss_bytes=rss, pss_bytes=pss)


def cpu_seconds(pid: int) -> float:
    """User and system time, that of ended and collected children included."""
    return sum(_ticks(one) for one in tree(pid)) / _TICKS


def _ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(int(value) for value in fields[11:15])  # utime, stime, cutime, cstime


def machine_cpu_seconds() -> float:
    """What all processes of this machine have used since it started, waiting for disks left out."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    user, nice, system, _, _, irq, softirq = (int(value) for value in fields[1:8])
    return (user + nice + system + irq + softirq) / _TICKS
