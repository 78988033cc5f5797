"""A running conductor for tests: the execution service and the run driver on one event loop, in a thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tests.support.dagster_side import Side
from tests.support.service import RunningService
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


class ConductorSide(Side):
    """Runs are handed over by `ValohaiRunLauncher` and driven by a conductor."""

    name = "conductor"

    def instance_options(self) -> dict[str, Any]:
        return {**super().instance_options(), **LAUNCHER}

    @contextlib.contextmanager
    def start_service(self, settings: Settings) -> Iterator[RunningService]:
        conductor = RunningConductor(settings).start()
        try:
            yield conductor
        finally:
            conductor.close()
