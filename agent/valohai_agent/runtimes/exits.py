"""Explains unusual ends of a command in words."""

from __future__ import annotations

import signal

from valohai_agent.checksums import decimal_size
from valohai_agent.runtimes.base import ExitStatus

IN_IMAGE = "the image has it"
ON_WORKER = (
    "it is installed on this worker or in the job's virtual environment (no image is used here)"
)


def explain(
    code: int,
    *,
    oom: bool,
    limit: int | None = None,
    signalled: bool = False,
    programs: str = IN_IMAGE,
) -> ExitStatus:
    """The status with its explanation; `signalled` when a stop of ours ended the command (C-29).

    `programs` says what to check about where the programs come from: IN_IMAGE or ON_WORKER.
    """
    if oom and code != 0:
        words: str | None = _memory_words(limit)
    else:
        words = None if signalled else _words(code, programs)
    return ExitStatus(code=code, oom_killed=oom, message=words)


def _memory_words(limit: int | None) -> str:
    allowed = f" (limit {decimal_size(limit)})" if limit else ""
    return (
        f"The command was killed because it ran out of memory{allowed}. "
        "Use less memory, raise VH_MEMORY_LIMIT if it is set, or use a larger machine."
    )


def _words(code: int, programs: str) -> str | None:
    if code == 127:
        return f"A command was not found (exit code 127). Check its name, and that {programs}."
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
