"""Private virtual environments for jobs of the process runtime, one made ahead of time."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import uuid
from pathlib import Path

from valohai_agent.errors import StartError

log = logging.getLogger(__name__)


class Venvs:
    """Gives each job an environment of its own. A spare one waits, so that the start takes no time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / f"agent-{os.getpid()}"
        self._base = directory
        self._lock = threading.Lock()
        self._spare: Path | None = None
        self._making = False

    def warm_up(self) -> None:
        """Makes the spare environment in the background."""
        with self._lock:
            if self._spare is not None or self._making:
                return
            self._making = True
        threading.Thread(target=self._make_spare, name="venv", daemon=True).start()

    def take(self) -> Path:
        """An environment for one job; raises StartError."""
        with self._lock:
            taken, self._spare = self._spare, None
        return taken or self._make()

    def drop(self, venv: Path) -> None:
        shutil.rmtree(venv, ignore_errors=True)

    def _make_spare(self) -> None:
        try:
            made = self._make()
        except StartError as error:
            log.warning("%s", error, extra={"action": "venv"})
            made = None
        with self._lock:
            self._spare, self._making = made, False

    def _make(self) -> Path:
        self._remove_dead()
        path = self._directory / uuid.uuid4().hex[:12]
        try:
            import virtualenv

            virtualenv.cli_run(
                [str(path), "--python", sys.executable, "--no-periodic-update", "--no-download"],
                setup_logging=False,
            )
        except (Exception, SystemExit) as error:  # virtualenv raises whatever its plugins raise
            raise StartError(f"The private virtual environment cannot be made: {error}") from error
        return path

    def _remove_dead(self) -> None:
        """Environments of agents that are gone."""
        if self._directory.exists():
            return
        self._directory.mkdir(parents=True)
        for other in self._base.glob("agent-*"):
            pid = other.name.rpartition("-")[2]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(other, ignore_errors=True)
