"""A running conductor for tests: the execution service and the run driver on one event loop, in a thread."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tests.support.dagster_side import Side
from tests.support.deployment import START_SECONDS, Background
from tests.support.ports import wait_for
from tests.support.service import RunningService
from valohai_dagster.embedded.conductor import running_conductor
from valohai_dagster.executions.service import ExecutionService
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import open_stores
from valohai_dagster.web.conductor import Driving, _serve_executions

LAUNCHER = {
    "run_launcher": {"module": "valohai_dagster.plugin.launcher", "class": "ValohaiRunLauncher"}
}


class RunningConductor(RunningService):
    """`start` and `kill` as often as a test likes; records, Redis and Dagster's storage stay."""

    async def _serve(self, service: ExecutionService) -> None:
        driving = Driving(self.settings, service, self.records, open_stores(self.settings))
        await _serve_executions(service, driving)


class ConductorProcess(RunningService):
    """The same as a process of its own, started as an operator does."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._process: Background | None = None

    def start(self) -> ConductorProcess:
        self._process = Background(
            [sys.executable, "-m", "valohai_dagster", "conductor"],
            self.settings.state_dir / "conductor-process.log",
            {"VALOHAI_HTTP_PORT": "0"},
        )
        wait_for(self._serves, seconds=START_SECONDS, what="the conductor")
        return self

    def _serves(self) -> bool:
        assert self._process is not None
        assert self._process.process.poll() is None, self._process.log
        return running_conductor(self.settings) is not None

    def kill(self) -> None:
        if self._process is not None:
            self._process.process.kill()
        self.leave()

    def leave(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None


class ConductorSide(Side):
    """Runs are handed over by `ValohaiRunLauncher` and driven by a conductor."""

    name = "conductor"

    def instance_options(self) -> dict[str, Any]:
        return {**super().instance_options(), **LAUNCHER}

    conductor: type[RunningService] = RunningConductor

    @contextlib.contextmanager
    def start_service(self, settings: Settings) -> Iterator[RunningService]:
        conductor = self.conductor(settings).start()
        try:
            yield conductor
        finally:
            conductor.close()


class ConductorProcessSide(ConductorSide):
    """With a conductor process."""

    conductor = ConductorProcess
