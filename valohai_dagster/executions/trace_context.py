"""Trace and span ids of executions (W3C trace context), worked out from what they are.

Nothing has to be kept: a conductor that takes an execution over knows the same ids, and a job can carry them before
there is a span.
"""

from __future__ import annotations

import hashlib


def trace_id_of(run_id: str | None, execution_id: str) -> int:
    """All executions of a run share one trace."""
    return _number(f"trace/{run_id or execution_id}", 16)


def span_id_of(execution_id: str, part: str = "") -> int:
    """`part` names a span below that of the execution."""
    return _number(f"span/{execution_id}/{part}", 8)


def traceparent_of(run_id: str | None, execution_id: str) -> str:
    """What the user's command gets as TRACEPARENT, so that its spans are below the execution's.

    >>> traceparent_of(None, "e1")[:3], len(traceparent_of(None, "e1"))
    ('00-', 55)
    """
    return f"00-{trace_id_of(run_id, execution_id):032x}-{span_id_of(execution_id):016x}-01"


def _number(text: str, size: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], "big") or 1
