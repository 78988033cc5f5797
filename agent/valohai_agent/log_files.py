"""Stores the complete logs of an execution when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from valohai_agent.errors import AgentError, OutputError
from valohai_agent.protocol import GrantRequest, Grants, LogStored
from valohai_agent.transfer import Transferer
from valohai_agent.upload_grants import further_parts, granted

LOG_SECONDS = 120.0  # that tries to store the logs go on; what is not stored then the control plane may salvage
LOG_PAUSE_SECONDS = 2.0  # after the first try; doubled each time
LOG_LONGEST_PAUSE_SECONDS = 60.0


def upload_logs(
    files: Mapping[str, Path],
    lines: Mapping[str, int],
    *,
    transferer: Transferer,
    request_grants: Callable[[list[GrantRequest]], Grants],
    warn: Callable[[str], None],
    wait: Callable[[float], bool],
    now: Callable[[], float] = time.monotonic,
) -> list[LogStored]:
    """Stores the complete log files (stdout, stderr, events); what fails for LOG_SECONDS is a warning only.

    `wait` waits some seconds between two tries; it gives True when there shall be no other.
    """
    stored: list[LogStored] = []
    missing, pause, end = list(files), LOG_PAUSE_SECONDS, now() + LOG_SECONDS
    while True:
        problems: dict[str, str] = {}
        requests = [
            GrantRequest(id=f"log-{name}", kind="log", name=name, size=_size(files[name]))
            for name in missing
        ]
        grants = request_grants(requests)
        for name in missing:
            grant = granted(grants, f"log-{name}")
            try:
                if isinstance(grant, str):
                    raise OutputError(grant)
                size = transferer.upload(
                    files[name],
                    grant,
                    name=f"log {name!r}",
                    more=further_parts(request_grants, grant.upload_id),
                ).size
            except (AgentError, OSError) as error:
                problems[name] = str(error)
                continue
            report = {"stream": name, "upload_id": grant.upload_id, "size": size}
            stored.append(LogStored.model_validate({**report, "lines": lines.get(name, 0)}))
        missing = list(problems)
        if not missing or now() + pause > end:
            break
        if pause == LOG_PAUSE_SECONDS:
            said = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
            warn(f"Logs could not be stored, trying for {LOG_SECONDS:g} s more: {said}.")
        if wait(pause):
            break
        pause = min(pause * 2, LOG_LONGEST_PAUSE_SECONDS)
    for name, problem in problems.items():
        warn(f"The {name} log could not be stored: {problem}.")
    return stored


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
