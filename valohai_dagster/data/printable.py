"""Names of files in messages and tables, as the agent shows them."""

from __future__ import annotations

from valohai_agent.printable import printable

__all__ = ["printable"]
