"""The complete log of one attempt, on its way from the console to the store."""

from __future__ import annotations

from collections.abc import Callable

from valohai_agent.console import Console
from valohai_agent.errors import AgentError
from valohai_agent.lease import Lease
from valohai_agent.log_files import upload_logs
from valohai_agent.protocol import LogStored, Warned
from valohai_agent.transfer import Transferer


def store_logs(console: Console, lease: Lease, *, wait: Callable[[float], bool]) -> list[LogStored]:
    """The complete files; of what cannot be stored the control plane keeps the live log, or our file on its host."""
    files = console.close()
    if console.write_error:
        lease.report(Warned(message=console.write_error))
    lease.live_log.close()
    try:
        return upload_logs(
            {name: log.path for name, log in files.items()},
            {name: log.lines for name, log in files.items()},
            transferer=Transferer(),
            request_grants=lease.request_grants,
            warn=lambda text: lease.report(Warned(message=text)),
            wait=wait,
        )
    except AgentError as exc:
        lease.report(Warned(message=f"the complete log could not be stored: {exc}"))
        return []
