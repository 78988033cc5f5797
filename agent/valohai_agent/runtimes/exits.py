"""Explains unusual ends of a command in words."""

from __future__ import annotations

import signal

from valohai_agent.checksums import decimal_size
from valohai_agent.runtimes.base import ExitStatus


def explain(
    code: int, *, oom: bool, limit: int | None = None, signalled: bool = False
) -> ExitStatus:
    """The status with its explanation; `signalled` when a stop of ours ended the command (C-29)."""
    return ExitStatus(code=code, oom_killed=oom, message=_words(code, oom, limit, signalled))


def _words(code: int, oom: bool, limit: int | None, signalled: bool) -> str | None:
    if oom and code != 0:
        allowed = f" (limit {decimal_size(limit)})" if limit else ""
        return (
            f"The command was killed because it ran out of memory{allowed}. "
            "Use less memory, raise VH_MEMORY_LIMIT if it is set, or use a larger machine."
        )
    if signalled or code == 0:
        return None
    if code == 127:
        return "A command was not found (exit code 127). Check its name, and that the image has it."
    if code == 126:
        return "A command is not executable (exit code 126). Check its mode and its interpreter."
    if code > 128:
        return f"The command was killed by {_signal(code - 128)} (exit code {code})."
    return None


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
