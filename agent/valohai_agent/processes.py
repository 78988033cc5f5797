"""Finds and ends the processes of an attempt, even those that left its session.

Every process of the process runtime inherits VH_EXECUTION_ID and VALOHAI_ATTEMPT. Reading them from
`/proc/<pid>/environ` needs no notes on disk, so that processes of an agent that died can be ended too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

ATTEMPT_VARIABLE = "VALOHAI_ATTEMPT"


def kill_attempt(execution_id: str, attempt: int | None, *, rounds: int = 20) -> int:
    """Kills all processes of one attempt (None: of any) here; repeats while new ones appear."""
    killed: set[int] = set()
    for turn in range(rounds):
        living = attempt_processes(execution_id, attempt)
        if not living:
            break
        for pid in living:
            _kill(pid)
            killed.add(pid)
        time.sleep(0.01 * (turn + 1))
    return len(killed)


def attempt_processes(execution_id: str, attempt: int | None) -> list[int]:
    """Process ids that carry the marks of this attempt; zombies and foreign processes left out."""
    marks = {f"VH_EXECUTION_ID={execution_id}".encode()}
    if attempt is not None:
        marks.add(f"{ATTEMPT_VARIABLE}={attempt}".encode())
    own = os.getpid()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == own:
            continue
        try:
            environ = set((entry / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        if marks <= environ:
            found.append(int(entry.name))
    return found


def used_by(pids: Sequence[int]) -> tuple[float, int] | None:
    """CPU seconds, those of ended children included, and resident bytes of these processes; None if none lives."""
    ticks, pages, found = 0, 0, False
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            continue
        fields = text.rpartition(")")[2].split()  # the name before may hold anything
        ticks += sum(int(field) for field in fields[11:15])
        pages += int(fields[21])
        found = True
    if not found:
        return None
    return ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE")


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
