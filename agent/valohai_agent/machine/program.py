"""The agent's command line as another process: how it is started, and how it says why it has ended."""

from __future__ import annotations

import os
import sys

FILE_VARIABLE = "VALOHAI_AGENT_FILE"  # set by the one-file agent: where it lies
SUPERVISED_VARIABLE = "VALOHAI_AGENT_SUPERVISED"  # set where the agent is kept up to date
EXIT_REFUSED = 2  # cannot work like this; restarting will not help
EXIT_UPDATE = 4  # gives way to a newer agent: to be started again
BUSY_MARK = "busy"  # in the work directory; touched while something runs


def program() -> list[str]:
    """What starts this agent's command line."""
    file = os.environ.get(FILE_VARIABLE)
    return [sys.executable, file] if file else [sys.executable, "-m", "valohai_agent"]
