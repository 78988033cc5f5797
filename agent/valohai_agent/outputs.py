"""Collects `/valohai/outputs`: live while the command runs, the rest when it has ended (CONTRACT 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from valohai_agent.protocol import GrantRequest, Grants, LogStored, OutputStored
from valohai_agent.transfer import Transferer
from valohai_agent.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class OutputSummary:
    """What became of the outputs. `problems` are failures that turn `complete` into `error` (O-18)."""

    stored: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


class OutputCollector:
    """Uploads outputs and reports each as one datum.

    `request_grants` asks the control plane (at most MAX_GRANT_REQUESTS at a time) and blocks until it answers.
    `report` takes each stored output; `status` writes to the status stream; `warn` reports a warning as well.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        transferer: Transferer,
        request_grants: Callable[[list[GrantRequest]], Grants],
        report: Callable[[OutputStored], None],
        status: Callable[[str], None],
        warn: Callable[[str], None],
        progress: Callable[[int, int | None], None] | None = None,
        valohai_dir: str = "/valohai",
        parallel: int = 4,
    ) -> None:
        raise NotImplementedError

    def start_live(self, *, interval_seconds: float = 1.0) -> None:
        """Starts the thread that picks up read-only files (O-03, O-04)."""
        raise NotImplementedError

    def scan_now(self) -> int:
        """Picks up and uploads read-only files now; gives how many were stored."""
        raise NotImplementedError

    def finish(self) -> OutputSummary:
        """Ends the live thread and uploads everything that is left, after the command ended however it did."""
        raise NotImplementedError


def upload_logs(
    files: dict[str, Path],
    lines: dict[str, int],
    *,
    transferer: Transferer,
    request_grants: Callable[[list[GrantRequest]], Grants],
    warn: Callable[[str], None],
) -> list[LogStored]:
    """Stores the complete log files (stdout, stderr, events); a failure is a warning, never a lost result."""
    raise NotImplementedError
