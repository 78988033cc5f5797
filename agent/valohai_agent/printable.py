"""Names of files in messages and tables: a name may hold anything, a line must stay a line."""

from __future__ import annotations


def printable(name: str) -> str:
    """The name with control characters, line breaks among them, shown escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)
